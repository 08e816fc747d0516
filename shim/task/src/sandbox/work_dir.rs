//! overlayfs's work folder beside an upper-dir of the user's choice: made for one container, locked while it
//! is in use, removed with it.
//!
//! Two VMs that write to one upper would each believe to be alone and ruin it; the upper's own lock, taken before,
//! refuses the second. This one keeps a clean-up, and a union that is told to use the folder, away from it. A killed
//! shim's lock goes with its process; the folder then goes with the clean-up or the next use.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

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
    /// Makes the folder anew and locks it.
    pub fn create(path: &Path) -> Result<Self, WorkDirError> {
        let failed = |source| WorkDirError::Io { path: path.to_owned(), source };
        DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(failed)?;
        let lock = File::open(path).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(WorkDirError::InUse(path.to_owned())),
            Err(error) => return Err(failed(error.into())),
        }
        empty(path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Removes what a killed shim left, unless another container uses it by now.
    pub fn remove_stale(path: &Path) -> Result<(), WorkDirError> {
        if path.exists() { Self::create(path).map(drop) } else { Ok(()) }
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("Cannot remove the work folder {}: {error}", self.path.display());
        }
    }
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
        assert!(matches!(WorkDir::create(&path), Err(WorkDirError::InUse(_))));
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
}
