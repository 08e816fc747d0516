//! A mount that is in its place: watched until nobody uses it any more.
//!
//! Invariant: a VM or container that ends leaves the mount where it is, and all that is asked of it fails: what lies
//! under a mountpoint is nobody's to write to by surprise. What could not be written to disk in the end stays noted in
//! the run directory until somebody has seen it.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{error, warn};
use vmctr_fileshare::export::host::{Export, Figures};
use vmctr_fileshare::share::Locks;
use vmctr_vmm::error_chain;
use vmctr_vmm::run_dir::RunDir;

use super::record;

/// Between two looks whether the mount is still there.
const POLL: Duration = Duration::from_millis(50);

/// How long a mount that is to end waits for whoever still has a file open.
const GRACE: Duration = Duration::from_secs(10);

/// A mount. Its folders stay locked until it is gone.
#[derive(Debug)]
pub struct Served {
    export: Export,
    run_dir: RunDir,
    mountpoint: PathBuf,
    _locks: Locks,
}

impl Served {
    /// What was mounted a moment ago.
    pub fn new(export: Export, run_dir: RunDir, mountpoint: PathBuf, locks: Locks) -> Self {
        Self { export, run_dir, mountpoint, _locks: locks }
    }

    /// Returns when nobody uses the mount any more, or some time after `end` has become true; whether the mount failed
    /// before, for the reason that `cause` then gives.
    pub async fn until_gone(&self, mut end: watch::Receiver<bool>, cause: impl Fn() -> String) -> bool {
        let (mut lost, mut until, mut told) = (false, None, Figures::default());
        while !self.export.is_gone() && until.is_none_or(|until| Instant::now() < until) {
            lost = self.look(lost, &cause);
            let figures = self.export.figures();
            if figures != told {
                // For whoever asks: a union does not depend on them.
                let _ = record::write_relay(self.run_dir.path(), &figures.clone().into());
                told = figures;
            }
            tokio::select! {
                () = sleep(POLL) => {}
                // Its sender lives as long as the process.
                _ = end.wait_for(|end| *end), if until.is_none() => {
                    self.take_away();
                    until = Some(Instant::now() + GRACE);
                }
            }
        }
        if self.export.is_gone()
            && let Err(error) = record::write_gone(self.run_dir.path())
        {
            warn!("Cannot write down that the mount is gone: {error}");
        }
        // What failed since the last look may have done so after the unmount, when nobody could see it: not counted.
        lost
    }

    /// Whether the mount fails; noted when that is news.
    fn look(&self, lost: bool, cause: &impl Fn() -> String) -> bool {
        let why = self.export.lost();
        if let Some(why) = why.filter(|_| !lost) {
            self.note(&format!("The mount fails: {why}; {}", cause()));
            return true;
        }
        lost
    }

    /// Writes down what went wrong.
    pub fn note(&self, why: &str) {
        error!("{}: {why}", self.mountpoint.display());
        if let Err(error) = record::note_lost(self.run_dir.path(), why) {
            error!("Cannot write down what was lost: {error}");
        }
    }

    /// Unmounts it, whoever uses it.
    pub fn take_away(&self) {
        let place = self.mountpoint.display();
        match self.export.take_away() {
            Ok(true) => {}
            Ok(false) => {
                warn!("{place} is unmounted already, or has another mount over it, which is left there")
            }
            Err(error) => warn!("Cannot unmount {place}: {error}"),
        }
    }

    /// Forgets it: its folders can be used again, and its run directory goes unless there is something to be known.
    pub fn finish(self, lost: bool) {
        let Self { export, run_dir, .. } = self;
        drop(export);
        let left = if lost { run_dir.disown() } else { run_dir.remove() };
        if let Err(error) = left {
            error!("{}", error_chain(&error));
        }
    }
}
