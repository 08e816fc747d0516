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
use super::record::{self, State};
use crate::cli::UnionUmount;
use crate::failure::{Failure, Outcome, Verdict};

/// As long as writing to disk may take.
const PATIENCE: Duration = Duration::from_secs(330);
const POLL: Duration = Duration::from_millis(20);

/// A VM that starts copies the host's mounts and drops them: for that moment, each of them is busy.
const BUSY_FOR_A_MOMENT: Duration = Duration::from_millis(300);

/// Unmounts, and clears up after a process that was killed.
pub fn run(config: &Config, args: &UnionUmount) -> Outcome {
    let shown = args.mountpoint.display();
    let place = record::resolve(&args.mountpoint).with_context(|| format!("Cannot use {shown}"))?;
    let known = record::find(&config.run_dir, &place)?;
    if record::is_mounted(&place) {
        take_away(&place, args.lazy)?;
    } else if known.is_none() {
        return Err(Failure::not_found(anyhow!("No union or container is mounted on {shown}")));
    }
    let was_served = known.is_some_and(|known| known.state() != State::Dead);
    // Whoever still has a file open keeps the VM.
    if !args.lazy {
        wait_for_end(config, &place)?;
    }
    match clear_up(config, &place)? {
        Some(why) if was_served => Err(anyhow!(why).into()),
        _ => Ok(Verdict::Good),
    }
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

fn wait_for_end(config: &Config, place: &Path) -> anyhow::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match record::find(&config.run_dir, place)?.map(|mount| mount.state()) {
            Some(State::Dead) => return Ok(()),
            None if !record::has_files(&config.run_dir, place) => return Ok(()),
            _ if Instant::now() < until => sleep(POLL),
            _ => return Err(anyhow!("The mount's process does not end")),
        }
    }
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
