//! `vmctr union umount` and `vmctr umount`: take the mount away and wait until its changes are on disk and its own VM
//! is gone.

use std::io;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use rustix::io::Errno;
use vmctr_fileshare::export::host::unmount;
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::{self, RunDirError};

use super::owners;
use super::record::{self, Mount, State};
use super::table::{self, Line};
use super::users::{self, User};
use crate::cli::UnionUmount;
use crate::failure::{Failure, Outcome, Verdict};
use crate::output::shell_word;

/// As long as writing to disk may take.
const PATIENCE: Duration = Duration::from_secs(330);
const POLL: Duration = Duration::from_millis(20);

/// A VM that starts copies the host's mounts and drops them: for that moment, each of them is busy.
const BUSY_FOR_A_MOMENT: Duration = Duration::from_millis(300);

/// Whoever uses it for longer is no such VM.
const USED_LIMIT: Duration = Duration::from_secs(5);

/// Between two looks at all processes of this host.
const LOOK: Duration = Duration::from_millis(500);

/// Unmounts, and clears up after a process that was killed.
pub fn run(config: &Config, args: &UnionUmount) -> Outcome {
    let shown = args.mountpoint.display();
    let place = record::resolve(&args.mountpoint).with_context(|| format!("Cannot use {shown}"))?;
    let known = record::find(&config.run_dir, &place)?;
    known.iter().try_for_each(check_complete)?;
    // It may end before anybody looks again.
    let was_served = known.as_ref().is_some_and(|known| known.state() != State::Dead);
    if known.as_ref().map_or_else(|| record::is_mounted(&place), Mount::is_mounted) {
        check_uncovered(&place, known.as_ref())?;
        take_away(&place, args.lazy)?;
    } else if known.is_none() {
        return Err(Failure::not_found(anyhow!("No union or container is mounted on {shown}")));
    }
    // Whoever still has a file open keeps the VM.
    if !args.lazy {
        let device = known.and_then(|known| known.device);
        wait_for_end(config, &place, device.as_deref())?;
    }
    match clear_up(config, &place)? {
        Some(why) if was_served => Err(anyhow!(why).into()),
        _ => Ok(Verdict::Good),
    }
}

/// Whoever mounts it gives up when it is interrupted, and leaves nothing.
fn check_complete(known: &Mount) -> Result<(), Failure> {
    if !known.is_coming() {
        return Ok(());
    }
    let error = anyhow!("A {} is just being mounted on {}", known.kind(), known.mountpoint.display());
    Err(Failure::failed(error).hint("unmount it when it is there, or interrupt the command that mounts it"))
}

/// Whatever is mounted on top would be taken away instead.
fn check_uncovered(place: &Path, known: Option<&Mount>) -> Result<(), Failure> {
    let device = known.and_then(|known| known.device.as_ref());
    let is_it = |line: &Line| line.is_ours() && device.is_none_or(|device| *device == line.device);
    let Some(line) = table::topmost(place).filter(|line| !is_it(line)) else { return Ok(()) };
    let (shown, Line { kind, source, .. }) = (place.display(), line);
    let error = anyhow!("Something else is mounted on {shown}, over it: {source}, of type {kind}");
    Err(Failure::failed(error).hint(format!("`umount {}` takes that away", shell_word(place))))
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
}

fn unmount_patiently(place: &Path, lazy: bool) -> io::Result<()> {
    let until = Instant::now() + BUSY_FOR_A_MOMENT;
    loop {
        match unmount(place, lazy) {
            Err(error) if is_busy(&error) && Instant::now() < until => sleep(POLL),
            outcome => return outcome,
        }
    }
}

fn take_away(place: &Path, lazy: bool) -> Result<(), Failure> {
    let shown = place.display();
    unmount_patiently(place, lazy).map_err(|error| {
        let busy = is_busy(&error);
        let failure = Failure::failed(anyhow!(error).context(format!("Cannot unmount {shown}")));
        if busy {
            failure.hint("`-l` takes it away now and ends it when nobody uses it any more")
        } else {
            failure
        }
    })
}

fn wait_for_end(config: &Config, place: &Path, device: Option<&str>) -> anyhow::Result<()> {
    let until = Instant::now() + PATIENCE;
    let mut watch = Watch::new(device);
    loop {
        let mount = record::find(&config.run_dir, place)?;
        match mount.as_ref().map(Mount::state) {
            Some(State::Dead) => return Ok(()),
            Some(State::Mounted) if mount.as_ref().is_some_and(|mount| is_another(mount, device)) => {
                return Ok(());
            }
            None if !record::has_files(&config.run_dir, place) => return Ok(()),
            _ if Instant::now() < until => sleep(POLL),
            _ => return Err(late(place, mount.as_ref())),
        }
        if let Some(user) = watch.look(config, place)? {
            let place = place.display();
            return Err(anyhow!("What was mounted on {place} is unmounted there, but still used: {user}"));
        }
    }
}

/// Whether it has the place of the one with this device since.
fn is_another(mount: &Mount, device: Option<&str>) -> bool {
    device.is_some() && mount.device.as_deref() != device
}

fn late(place: &Path, mount: Option<&Mount>) -> anyhow::Error {
    let (place, limit) = (place.display(), PATIENCE.as_secs());
    let log = mount.map_or_else(String::new, |mount| {
        format!(": what it does is in {}", record::log(&mount.entry.path).display())
    });
    anyhow!("The process of what was mounted on {place} has not ended within {limit} s{log}")
}

/// Looks now and then who uses what was unmounted.
struct Watch<'a> {
    device: Option<&'a str>,
    last: Instant,
    found_since: Option<Instant>,
}

impl<'a> Watch<'a> {
    fn new(device: Option<&'a str>) -> Self {
        Self { device, last: Instant::now(), found_since: None }
    }

    /// Whoever has used it for some time.
    fn look(&mut self, config: &Config, place: &Path) -> Result<Option<User>, RunDirError> {
        let Some(device) = self.device.filter(|_| self.last.elapsed() > LOOK) else { return Ok(None) };
        let is_gone = is_gone(&record::list(&config.run_dir)?, place, device);
        let user = if is_gone { None } else { users::find(device) };
        self.last = Instant::now();
        self.found_since = user.is_some().then(|| self.found_since.unwrap_or(self.last));
        let long = self.found_since.is_some_and(|since| since.elapsed() > USED_LIMIT);
        Ok(user.filter(|_| long))
    }
}

/// Whether the file system is known to be gone: its number is another's from then on.
fn is_gone(mounts: &[Mount], place: &Path, device: &str) -> bool {
    mounts.iter().any(|mount| {
        let has_it = mount.device.as_deref() == Some(device);
        if mount.mountpoint == place { !has_it } else { has_it && mount.is_mounted() }
    })
}

/// Removes what a process has left; what it has noted.
fn clear_up(config: &Config, place: &Path) -> anyhow::Result<Option<String>> {
    let Some(mount) = record::find(&config.run_dir, place)? else { return Ok(None) };
    match run_dir::clear_dead(&config.run_dir, &mount.entry.key) {
        Ok(()) => owners::clear_up(config),
        // It was taken away lazily, or mounted anew in this moment.
        Err(RunDirError::InUse { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    Ok(mount.lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_uses_another_file_system_of_the_same_number_is_not_blamed() {
        let root = tempfile::tempdir().unwrap();
        let place = Path::new("/mnt/x");
        let dir = record::claim(root.path(), place).unwrap();
        let is_gone = || is_gone(&record::list(root.path()).unwrap(), place, "0:9999");
        std::fs::write(dir.path().join("device"), "0:9999").unwrap();
        assert!(!is_gone());
        record::write_gone(dir.path()).unwrap();
        assert!(is_gone());
    }

    #[test]
    fn what_is_not_mounted_yet_is_not_waited_for() {
        let root = tempfile::tempdir().unwrap();
        let config = Config { run_dir: root.path().join("run"), ..Config::default() };
        let place = root.path().canonicalize().unwrap();
        let dir = record::claim(&config.run_dir, &place).unwrap();
        for lazy in [false, true] {
            let refused = run(&config, &UnionUmount { lazy, mountpoint: place.clone() }).unwrap_err();
            assert!(refused.to_string().contains("is just being mounted"), "{refused}");
        }
        assert!(dir.path().exists());
    }
}
