//! Folders for the length of one command, in /var/tmp: it is meant for large files, and its file system knows all
//! attributes.
//!
//! ```text
//!   new:    make ── lock ─── in use ───────────── remove
//!                     └ fails: a sweep was faster; make another
//!   sweep:  lock what has our names ── succeeds: whoever made it is dead ── remove
//! ```
//!
//! Invariant: whoever uses a folder holds the lock on it, which the kernel lets go when the process ends, however
//! that happens. So no folder outlives its process for longer than until the next one is made.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, fstat, openat};
use rustix::io::Errno;
use tempfile::TempDir;

const PLACE: &str = "/var/tmp";
const PREFIX: &str = "vmctr-scratch-";
/// A sweep that is faster so often does not happen.
const ATTEMPTS: u32 = 10;

/// A folder, removed with this.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    _lock: File,
}

impl Scratch {
    /// A new one, after those whose processes died are gone.
    pub fn new() -> anyhow::Result<Self> {
        Self::new_in(Path::new(PLACE)).with_context(|| format!("cannot make a folder in {PLACE}"))
    }

    fn new_in(place: &Path) -> io::Result<Self> {
        sweep(place)?;
        for _ in 0..ATTEMPTS {
            let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(place)?;
            if let Some(lock) = lock(dir.path())? {
                return Ok(Self { dir, _lock: lock });
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes what dead processes left. What cannot be removed is no reason to fail.
fn sweep(place: &Path) -> io::Result<()> {
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            let _ = remove_if_left(&entry.path());
        }
    }
    Ok(())
}

fn remove_if_left(path: &PathBuf) -> io::Result<()> {
    match lock(path)? {
        Some(_lock) => fs::remove_dir_all(path),
        None => Ok(()),
    }
}

/// Locks a folder of our own; `None` if somebody else has it, or it is gone.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(CWD, path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        dir => dir?,
    };
    // Everybody may make folders there, under any name.
    if fstat(&dir)?.st_uid != rustix::process::geteuid().as_raw() {
        return Ok(None);
    }
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    // It may have been removed between the two steps.
    Ok(path.try_exists()?.then(|| dir.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_stays_and_what_was_left_goes() {
        let place = tempfile::tempdir().unwrap();
        let used = Scratch::new_in(place.path()).unwrap();
        fs::write(used.path().join("file"), "x").unwrap();
        let left = place.path().join("vmctr-scratch-left");
        fs::create_dir_all(left.join("deep/er")).unwrap();
        let other = place.path().join("other");
        fs::create_dir(&other).unwrap();
        let new = Scratch::new_in(place.path()).unwrap();
        assert!(used.path().join("file").exists() && other.exists());
        assert!(!left.exists());
        assert_ne!(used.path(), new.path());
        let path = used.path().to_owned();
        drop(used);
        assert!(!path.exists());
    }

    #[test]
    fn no_link_is_followed() {
        let place = tempfile::tempdir().unwrap();
        let target = tempfile::tempdir().unwrap();
        fs::write(target.path().join("precious"), "x").unwrap();
        std::os::unix::fs::symlink(target.path(), place.path().join("vmctr-scratch-link")).unwrap();
        drop(Scratch::new_in(place.path()).unwrap());
        assert!(target.path().join("precious").exists());
    }
}
