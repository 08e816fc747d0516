//! `vmctr union mount` and `vmctr mount`: check, find or start the background process and wait for its word.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, anyhow, bail};
use vmctr_vmm::config::Config;

use super::check::Plan;
use super::options::{self, Options};
use super::order::{Answer, Order};
use super::owners::{self, Turn};
use super::record::{self, State};
use super::target::Target;
use crate::cli::{MountArgs, UnionMount};
use crate::commands::Context;
use crate::failure::{Failure, Outcome, Verdict};
use crate::sys::keep_descriptors;

/// Mounts a union.
pub fn run(config: &Config, args: &UnionMount) -> Outcome {
    check_free(config, &args.mountpoint)?;
    let own_vm = args.own_vm.then(|| options::OWN_VM.to_owned());
    let given: Vec<_> = args.options.iter().cloned().chain(own_vm).collect();
    let options = Options::parse(&given.join(",")).map_err(|error| {
        Failure::failed(error).hint("as in `-o lowerdir=A:B,upperdir=U,workdir=W MOUNTPOINT`")
    })?;
    mount(config, &Order::Union(Plan::check(options, &args.mountpoint)?))
}

/// Mounts a container's root.
pub async fn container(context: &Context, config: &Config, args: &MountArgs) -> Outcome {
    check_free(config, &args.dir)?;
    mount(config, &Order::Container(Target::check(context, config, args).await?))
}

fn mount(config: &Config, order: &Order) -> Outcome {
    let answer = match order {
        Order::Union(plan) if !options::own_vm(&plan.options) => in_a_common_vm(config, order)?,
        _ => wait(start(config, order)?)?,
    };
    match answer {
        Answer::Ready => Ok(Verdict::Good),
        Answer::Failed(why) => Err(anyhow!(why).into()),
        Answer::Taken | Answer::Declined => Err(anyhow!("The background process speaks nonsense").into()),
    }
}

/// By a VM that is there already, or else by a new one, for which all that come meanwhile wait.
fn in_a_common_vm(config: &Config, order: &Order) -> anyhow::Result<Answer> {
    let turn = Turn::take(config)?;
    owners::clear_up(config);
    let Some(mut taken) = owners::hand_over(config, order)? else { return wait(start(config, order)?) };
    drop(turn);
    let answer = Answer::read(&mut taken).context("The VM's process")?;
    answer.context("The VM's process ended without a word")
}

/// A mount that is there, or what is left of one.
fn check_free(config: &Config, mountpoint: &Path) -> Result<(), Failure> {
    let Ok(place) = record::resolve(mountpoint) else { return Ok(()) };
    let shown = place.display();
    let Some(found) = record::find(&config.run_dir, &place)? else { return Ok(()) };
    let kind = found.kind();
    match found.state() {
        State::Changing => Ok(()),
        State::Dead if found.lost.is_none() && !record::is_mounted(&place) => Ok(()),
        State::Mounted => Err(anyhow!("A {kind} is mounted on {shown} already").into()),
        State::Lost | State::Dead => {
            let left = format!("What is left of a {kind} is on {shown}");
            let left = found.lost.map_or(left.clone(), |why| format!("{left}: {why}"));
            Err(Failure::failed(anyhow!(left)).hint(format!("`vmctr umount {shown}` clears it")))
        }
    }
}

fn start(config: &Config, order: &Order) -> anyhow::Result<Child> {
    let mut command = Command::new(std::env::current_exe().context("Cannot find this program")?);
    command.args(["union", "serve"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", config.log.level.as_str());
    }
    keep_descriptors();
    let mut child = command.current_dir("/").spawn().context("Cannot start the background process")?;
    let order = serde_json::to_vec(order)?;
    let mut stdin = child.stdin.take().context("The background process has no input")?;
    stdin.write_all(&order).context("Cannot tell the background process what to mount")?;
    Ok(child)
}

fn wait(mut child: Child) -> anyhow::Result<Answer> {
    let stdout = child.stdout.take().context("The background process has no output")?;
    if let Some(answer) = Answer::read(&mut BufReader::new(stdout)).context("The background process")? {
        return Ok(answer);
    }
    let status = child.wait().context("The background process")?;
    bail!("The background process ended without a word ({status})");
}

/// The arguments as mount(8) gives them; `None` when it wants nothing done (`-f`).
pub fn helper_args(args: impl Iterator<Item = OsString>) -> Result<Option<UnionMount>, Failure> {
    let (mut places, mut options, mut fake) = (Vec::new(), Vec::new(), false);
    let mut args = args.map(|arg| arg.into_string().map_err(|arg| anyhow!("{} is not UTF-8", arg.display())));
    while let Some(arg) = args.next().transpose()? {
        let mut value = || args.next().transpose()?.with_context(|| format!("{arg} lacks its value"));
        match arg.as_str() {
            "-o" => options.push(value()?),
            "-t" => drop(value()?),
            "-f" => fake = true,
            "-n" | "-s" | "-v" => {}
            _ if arg.starts_with('-') => return Err(anyhow!("Option {arg} is not known").into()),
            _ => places.push(arg),
        }
    }
    let [_, mountpoint] = places.as_slice() else {
        return Err(anyhow!("usage: mount.fuse.vmctr vmctr MOUNTPOINT -o lowerdir=A[:B...],...").into());
    };
    Ok((!fake).then(|| UnionMount { options, own_vm: false, mountpoint: PathBuf::from(mountpoint) }))
}

/// Says the word, from the background process. Standard output ends with it.
pub fn answer(answer: &Answer) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(&answer.to_line()?)?;
    stdout.flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Option<UnionMount>, Failure> {
        helper_args(args.iter().map(OsString::from))
    }

    #[test]
    fn mounts_arguments_are_understood() {
        let args = ["vmctr", "/mnt", "-s", "-o", "rw,lowerdir=/a", "-t", "fuse.vmctr"];
        let args = parsed(&args).unwrap().unwrap();
        assert_eq!((args.options, args.mountpoint), (vec!["rw,lowerdir=/a".into()], "/mnt".into()));
        assert!(parsed(&["vmctr", "/mnt", "-f"]).unwrap().is_none());
        assert!(parsed(&["vmctr"]).is_err());
        assert!(parsed(&["vmctr", "/mnt", "-o"]).is_err());
        assert!(parsed(&["vmctr", "/mnt", "-x"]).is_err());
    }
}
