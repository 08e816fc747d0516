//! `vmctr union mount` and `vmctr mount`: check, find or start the background process and wait for its word.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, anyhow, bail};
use vmctr_vmm::config::Config;

use super::check::{self, CheckError, Plan};
use super::options::{self, Options, OptionsError};
use super::order::{Answer, Order};
use super::owners::{self, Turn};
use super::record::{self, State};
use super::target::Target;
use crate::cli::{MountArgs, UnionMount};
use crate::commands::Context;
use crate::failure::{Failure, Outcome, Verdict};
use crate::output::shell_word;
use crate::sys::keep_descriptors;

/// Mounts a union.
pub fn run(config: &Config, args: &UnionMount) -> Outcome {
    let own_vm = args.own_vm.then(|| options::OWN_VM.to_owned());
    let given: Vec<_> = args.options.iter().cloned().chain(own_vm).collect();
    let options = Options::parse(&given.join(",")).map_err(|error| match error {
        OptionsError::Remount => Failure::usage(error),
        error => Failure::usage(error).hint("as in `-o lowerdir=A:B,upperdir=U,workdir=W MOUNTPOINT`"),
    })?;
    check::check_host().map_err(|error| match error {
        CheckError::NotRoot => Failure::usage(error),
        error => Failure::failed(error),
    })?;
    check_free(config, &args.mountpoint)?;
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
            Err(Failure::failed(anyhow!(left))
                .hint(format!("`vmctr umount {}` clears it", shell_word(&place))))
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

/// Says the word, from the background process. Standard output ends with it.
pub fn answer(answer: &Answer) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(&answer.to_line()?)?;
    stdout.flush()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}
