//! overlayfs's work folder beside an upper-dir of the user's choice: made for one container, locked while it
//! is in use, removed with it.
//!
//! Two VMs that write to one upper would each believe to be alone and ruin it; the upper's own lock, taken before,
//! refuses the second. This one keeps a clean-up, and a union that is told to use the folder, away from it. A killed
//! shim's lock goes with its process; the folder then goes with the clean-up or the next use.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A clean-up has little to remove.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(10);

/// The folder, locked. Dropping it removes it.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    _lock: File,
}

/// The folder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum WorkDirError {
    /// Somebody else works in it.
    #[error("{} is in use by another union or container", .0.display())]
    InUse(PathBuf),
    /// It cannot be made.
    #[error("Cannot make the work folder {}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl WorkDir {
    /// Makes the folder anew and locks it. Blocks for a while where what a killed shim left is just being removed.
    pub fn create(path: &Path) -> Result<Self, WorkDirError> {
        Self::create_within(PATIENCE, path)
    }

    fn create_within(patience: Duration, path: &Path) -> Result<Self, WorkDirError> {
        let failed = |source| WorkDirError::Io { path: path.to_owned(), source };
        let until = Instant::now() + patience;
        let lock = loop {
            match try_lock(path).map_err(failed)? {
                Some(lock) => break lock,
                None if Instant::now() < until => sleep(POLL),
                None => return Err(WorkDirError::InUse(path.to_owned())),
            }
        };
        empty(path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Removes what a killed shim left, unless another container uses it by now.
    pub fn remove_stale(path: &Path) -> Result<(), WorkDirError> {
        if path.exists() { Self::create_within(Duration::ZERO, path).map(drop) } else { Ok(()) }
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("Cannot remove the work folder {}: {error}", self.path.display());
        }
    }
}

/// Makes the folder if it is missing, and locks it; none when somebody else has it, or has just removed it.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    DirBuilder::new().mode(0o700).recursive(true).create(path)?;
    let lock = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        lock => lock?,
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    let is_there = same(&lock.metadata()?, fs::metadata(path));
    Ok(is_there.then_some(lock))
}

fn same(one: &Metadata, other: io::Result<Metadata>) -> bool {
    other.is_ok_and(|other| (one.dev(), one.ino()) == (other.dev(), other.ino()))
}

fn empty(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_container_at_a_time_has_it_and_it_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".new.vmctr-work");
        let first = WorkDir::create(&path).unwrap();
        assert!(matches!(WorkDir::create_within(Duration::ZERO, &path), Err(WorkDirError::InUse(_))));
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_killed_shim_left_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".new.vmctr-work");
        fs::create_dir_all(path.join("work/deep")).unwrap();
        fs::write(path.join("file"), "").unwrap();
        let again = WorkDir::create(&path).unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        assert!(WorkDir::remove_stale(&path).is_err(), "taken away from its user");
        drop(again);
        fs::create_dir_all(path.join("work")).unwrap();
        WorkDir::remove_stale(&path).unwrap();
        assert!(!path.exists());
        WorkDir::remove_stale(&path).unwrap();
    }

    #[test]
    fn a_clean_up_in_this_moment_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".new.vmctr-work");
        let stale = WorkDir::create(&path).unwrap();
        std::thread::scope(|scope| {
            let next = scope.spawn(|| WorkDir::create(&path));
            sleep(5 * POLL);
            drop(stale);
            let next = next.join().unwrap().unwrap();
            assert!(same(&next._lock.metadata().unwrap(), fs::metadata(&path)));
        });
        assert!(!path.exists());
    }
}
