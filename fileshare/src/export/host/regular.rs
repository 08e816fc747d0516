//! Regular files of the shared folders, opened where the guest says that they lie.
//!
//! Invariants:
//! 1. What a name leads to is looked at before it is opened: nothing but a regular file ever is, beneath its folder;
//!    symbolic links are never followed.
//! 2. No more are open at a time than [`Permits`] there are.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{Mode, OFlags, ResolveFlags, Stat};

/// How many files may be open. Others are read and written through the guest.
const MOST: usize = 1024;

/// Leave to have files open.
#[derive(Debug, Default)]
pub(super) struct Permits(Arc<AtomicUsize>);

/// Leave to have one, until it is dropped.
#[derive(Debug)]
pub(super) struct Permit(Arc<AtomicUsize>);

impl Permits {
    pub(super) fn take(&self) -> Option<Permit> {
        // Dropped at once, and so given back, if it is one too many.
        let permit = Permit(Arc::clone(&self.0));
        (self.0.fetch_add(1, Ordering::Relaxed) < MOST).then_some(permit)
    }

    #[cfg(test)]
    pub(super) fn taken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A regular file that was found, and not opened yet.
#[derive(Debug)]
pub(super) struct Regular {
    place: OwnedFd,
    pub(super) stat: Stat,
}

impl Regular {
    /// Finds what lies at `path` below `folder`, on its mount.
    pub(super) fn find(folder: &OwnedFd, path: &[u8]) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let place = rustix::fs::openat2(folder, OsStr::from_bytes(path), flags, Mode::empty(), resolve)?;
        let stat = rustix::fs::fstat(&place)?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(another());
        }
        Ok(Self { place, stat })
    }

    /// Opens it.
    pub(super) fn open(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let magic = format!("/proc/self/fd/{}", self.place.as_raw_fd());
        Ok(rustix::fs::open(magic, flags | OFlags::CLOEXEC, Mode::empty())?)
    }
}

/// What was found is not what the guest means.
pub(super) fn another() -> io::Error {
    io::Error::other("another file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_end_and_come_back() {
        let permits = Permits::default();
        let mut taken: Vec<_> = (0..MOST).map(|_| permits.take().unwrap()).collect();
        assert!(permits.take().is_none() && permits.take().is_none());
        assert_eq!(permits.taken(), MOST);
        taken.pop();
        assert!(permits.take().is_some());
        drop(taken);
        assert_eq!(permits.taken(), 0);
    }
}
