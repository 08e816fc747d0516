//! Unions whose folders lie one inside the other: what one of them changes must not lie in what another one shows.
//!
//! ```text
//!   one:    record written ── looks at all others' records ── mounts
//!   other:       record written ── looks at all others' records ── refused
//! ```
//!
//! Invariant: whoever looks has written its own record before, so of two that begin in the same moment one at least
//! sees the other. One folder in both is for their locks to tell.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use vmctr_vmm::run_dir::RunDirError;

use super::check::{CheckError, Plan};
use super::order::Order;
use super::record::{self, State};

/// A union that was unmounted a moment ago still writes its changes to disk.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);

/// The union cannot be mounted beside the others.
#[derive(Debug, thiserror::Error)]
pub enum BesideError {
    /// The others are not known.
    #[error(transparent)]
    Records(#[from] RunDirError),
    /// One of them is in the way.
    #[error(transparent)]
    Folders(#[from] CheckError),
}

/// Checks a union, whose record is written, against all others that have a live process. Blocks for a while where the
/// other one is not mounted, or not any more.
pub fn check(run_dir: &Path, plan: &Plan) -> Result<(), BesideError> {
    check_for(run_dir, plan, PATIENCE)
}

fn check_for(run_dir: &Path, plan: &Plan, patience: Duration) -> Result<(), BesideError> {
    let until = Instant::now() + patience;
    loop {
        match look(run_dir, plan)? {
            None => return Ok(()),
            Some((State::Changing, _)) if Instant::now() < until => sleep(POLL),
            Some((_, error)) => return Err(error.into()),
        }
    }
}

/// The union that is in the way.
fn look(run_dir: &Path, plan: &Plan) -> Result<Option<(State, CheckError)>, BesideError> {
    for mount in record::list(run_dir)? {
        let state = mount.state();
        let Some(Order::Union(other)) = &mount.order else { continue };
        if state == State::Dead || mount.mountpoint == plan.mountpoint {
            continue;
        }
        if let Err(error) = plan.check_beside(other) {
            return Ok(Some((state, error)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use vmctr_vmm::run_dir::RunDir;

    use super::super::options::Options;
    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            for name in ["low/inner", "up", "work", "mnt", "low2", "up/inner", "work2", "mnt2", "run"] {
                fs::create_dir_all(place.0.path().join(name)).unwrap();
            }
            place
        }

        fn run_dir(&self) -> std::path::PathBuf {
            self.0.path().join("run")
        }

        fn plan(&self, low: &str, top: Option<(&str, &str)>, mnt: &str) -> Plan {
            let at = |name: &str| self.0.path().join(name);
            let top = top.map(|(up, work)| (at(up), at(work)));
            Plan::check(Options { lowers: vec![at(low)], top, words: vec![] }, &at(mnt)).unwrap()
        }

        /// As somebody records it who has not mounted it yet, or not any more.
        fn recorded(&self, plan: &Plan) -> RunDir {
            let dir = record::claim(&self.run_dir(), &plan.mountpoint).unwrap();
            record::write(dir.path(), &Order::Union(plan.clone())).unwrap();
            dir
        }

        fn check(&self, plan: &Plan) -> Result<(), BesideError> {
            check_for(&self.run_dir(), plan, Duration::ZERO)
        }
    }

    #[test]
    fn one_of_two_that_begin_at_once_sees_the_other() {
        let place = Place::new();
        let (one, other) =
            (place.plan("low", Some(("up", "work")), "mnt"), place.plan("up/inner", None, "mnt2"));
        place.recorded(&one);
        place.check(&one).unwrap();
        place.recorded(&other);
        let refused = place.check(&other).unwrap_err().to_string();
        assert!(refused.contains("overlaps the upper folder"), "{refused}");
    }

    #[test]
    fn what_is_dead_or_elsewhere_is_in_nobodys_way() {
        let place = Place::new();
        let (one, other) =
            (place.plan("low", Some(("up", "work")), "mnt"), place.plan("up/inner", None, "mnt2"));
        let dir = place.recorded(&one);
        place.check(&place.plan("low2", None, "mnt2")).unwrap();
        place.check(&place.plan("low/inner", None, "mnt2")).unwrap();
        dir.disown().unwrap();
        place.check(&other).unwrap();
    }

    #[test]
    fn one_that_goes_is_waited_for() {
        let place = Place::new();
        let (one, other) =
            (place.plan("low", Some(("up", "work")), "mnt"), place.plan("up/inner", None, "mnt2"));
        let dir = place.recorded(&one);
        let goes = std::thread::spawn(move || {
            sleep(Duration::from_millis(100));
            dir.remove().unwrap();
        });
        check_for(&place.run_dir(), &other, Duration::from_secs(60)).unwrap();
        goes.join().unwrap();
    }
}
