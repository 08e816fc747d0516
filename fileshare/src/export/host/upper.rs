//! Files of the upper folder, open on the host: there they are read and written, without the guest.
//!
//! ```text
//!   OPEN to write, CREATE ──> guest: handle, hint ── looked for below the upper folder ──> one file for the node
//!        all that opens, reads and writes the node meets in that file, and in the kernel's cache before it
//!   RELEASE of the last handle that came with a hint ──> closed; only then the guest is told
//!
//!   first read of another ──> guest: hint ──> a file of its own, to read
//! ```
//!
//! What a node is does not change: once a file lies in the upper folder it stays the same file there, however it is
//! renamed or linked, and while the guest knows it its inode's number is no other's.
//!
//! Invariants:
//! 1. Only regular files beneath the upper folder, on its file system, are opened; symbolic links are never followed.
//!    A guest that lies gets one upper file for another, which it could write to as well.
//! 2. Without an upper folder nothing is opened to be written to.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{AtFlags, OFlags, StatxFlags};

use super::check::check_attr;
use super::regular::{Permit, Permits, Regular, another};
use super::shared::lock;
use crate::export::privileges::write_like_anybody;
use crate::export::stat::attr;
use crate::export::wire::abi::{Attr, CAPABILITIES};
use crate::export::wire::lent::UpperHint;
use crate::folder;

/// The upper folder, and what of it is open.
#[derive(Debug, Default)]
pub(super) struct Upper {
    folder: Option<OwnedFd>,
    lent: Mutex<HashMap<u64, Lent>>,
    permits: Permits,
    reads: AtomicU64,
    writes: AtomicU64,
    refused: AtomicBool,
}

/// A node's file, and the guest's handles by which the kernel has it open.
#[derive(Debug)]
struct Lent {
    file: Arc<UpperFile>,
    /// Each with how many of the failed syncs it was told of.
    handles: HashMap<u64, u64>,
    /// How many syncs failed. This file's kernel tells of an error once, and here is one file for all handles.
    failed: u64,
}

/// An upper file, open on the host.
#[derive(Debug)]
pub(super) struct UpperFile {
    file: OwnedFd,
    shown: u64,
    _permit: Permit,
}

impl AsFd for UpperFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl UpperFile {
    /// Its attributes, as the union shows them; of what can be told by it, all but the inode's number.
    pub(super) fn attr(&self) -> Option<Attr> {
        let st = rustix::fs::statx(&self.file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).ok()?;
        Some(attr(&st, self.shown)).filter(|attr| check_attr(attr).is_ok())
    }
}

impl Upper {
    pub(super) fn open(folder: Option<&Path>) -> io::Result<Self> {
        let folder = folder.map(|path| folder::open(path, OFlags::RDONLY)).transpose()?;
        Ok(Self { folder, ..Self::default() })
    }

    /// Makes this thread one that may write upper files. Quotas and reserved space are respected, as by the share.
    pub(super) fn prepare_thread(&self) {
        if self.folder.is_none() {
            return;
        }
        if let Err(error) = write_like_anybody() {
            tracing::warn!(%error, "files of the upper folder are written through the guest");
            self.refused.store(true, Ordering::Release);
        }
    }

    /// Uses the node's file by itself from now on, while this handle of the guest's is open; whether it can.
    pub(super) fn lend(&self, nodeid: u64, handle: u64, hint: &[u8]) -> bool {
        let mut lent = lock(&self.lent);
        if let Some(known) = lent.get_mut(&nodeid) {
            known.handles.insert(handle, known.failed);
            return true;
        }
        let Some(file) = self.follow(hint, OFlags::RDWR) else { return false };
        lent.insert(nodeid, Lent { file, handles: HashMap::from([(handle, 0)]), failed: 0 });
        true
    }

    /// The node's file, if it is used here.
    pub(super) fn find(&self, nodeid: u64) -> Option<Arc<UpperFile>> {
        lock(&self.lent).get(&nodeid).map(|lent| Arc::clone(&lent.file))
    }

    /// The kernel closed one of the guest's handles.
    pub(super) fn release(&self, nodeid: u64, handle: u64) {
        let mut lent = lock(&self.lent);
        let Some(known) = lent.get_mut(&nodeid) else { return };
        known.handles.remove(&handle);
        let gone = if known.handles.is_empty() { lent.remove(&nodeid) } else { None };
        // Closing can take long: after the lock.
        drop(lent);
        drop(gone);
    }

    /// What a sync by one of the handles is to say that went as `done`: an error is told to each once.
    pub(super) fn synced<E>(&self, nodeid: u64, handle: u64, done: Result<(), E>, error: E) -> Result<(), E> {
        let mut lent = lock(&self.lent);
        let Some(known) = lent.get_mut(&nodeid) else { return done };
        known.failed += u64::from(done.is_err());
        let Some(told) = known.handles.get_mut(&handle) else { return done };
        let news = std::mem::replace(told, known.failed) < known.failed;
        if news && done.is_ok() { Err(error) } else { done }
    }

    /// Opens the file that a hint names, to read it.
    pub(super) fn open_to_read(&self, hint: &[u8]) -> Option<Arc<UpperFile>> {
        self.follow(hint, OFlags::RDONLY)
    }

    /// Whether a write to the node's file takes no capabilities away from it.
    pub(super) fn is_bare(&self, nodeid: u64) -> bool {
        let value = |file: Arc<UpperFile>| rustix::fs::fgetxattr(&file.file, CAPABILITIES, &mut [0u8; 0]);
        self.find(nodeid).map(value) == Some(Err(rustix::io::Errno::NODATA))
    }

    /// Brings all that was written to disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.folder.as_ref().map_or(Ok(()), |folder| Ok(rustix::fs::syncfs(folder)?))
    }

    pub(super) fn count_read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_write(&self) {
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    /// How often something was read, and written.
    pub(super) fn figures(&self) -> (u64, u64) {
        (self.reads.load(Ordering::Relaxed), self.writes.load(Ordering::Relaxed))
    }

    fn follow(&self, hint: &[u8], how: OFlags) -> Option<Arc<UpperFile>> {
        let folder = self.folder.as_ref().filter(|_| !self.refused.load(Ordering::Acquire))?;
        let hint = UpperHint::take(hint).ok()?;
        let permit = self.permits.take()?;
        match find(folder, &hint, how) {
            Ok(file) => Some(Arc::new(UpperFile { file, shown: hint.shown, _permit: permit })),
            Err(error) => {
                tracing::debug!(%error, "a hint leads nowhere in the upper folder");
                None
            }
        }
    }
}

fn find(folder: &OwnedFd, hint: &UpperHint<'_>, how: OFlags) -> io::Result<OwnedFd> {
    let found = Regular::find(folder, hint.path)?;
    if found.stat.st_ino != hint.ino {
        return Err(another());
    }
    // Nobody waits here for a lease to be given back.
    found.open(how | OFlags::NONBLOCK)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use rustix::fs::Mode;

    use super::*;

    fn hint(path: &str, like: &Path) -> Vec<u8> {
        let mut hint = Vec::new();
        let ino = fs::metadata(like).unwrap().ino();
        UpperHint { ino, shown: 9, path: path.as_bytes() }.put(&mut hint);
        hint
    }

    #[test]
    fn only_regular_files_beneath_the_folder_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("upper");
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::write(folder.join("sub/file"), "inside").unwrap();
        fs::write(dir.path().join("secret"), "outside").unwrap();
        symlink("../secret", folder.join("link")).unwrap();
        symlink("sub", folder.join("dirlink")).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, folder.join("fifo"), fifo, Mode::RWXU, 0).unwrap();
        let upper = Upper::open(Some(&folder)).unwrap();
        let (inside, secret) = (folder.join("sub/file"), dir.path().join("secret"));
        assert!(upper.lend(7, 1, &hint("sub/file", &inside)));
        assert_eq!(upper.find(7).unwrap().attr().unwrap().ino, 9);
        for path in ["../secret", "/etc/passwd", "link", "sub/../../secret", "dirlink/file", "sub/\0", "none"]
        {
            assert!(!upper.lend(8, 1, &hint(path, &secret)), "{path}");
            assert!(upper.open_to_read(&hint(path, &inside)).is_none(), "{path}");
        }
        assert!(!upper.lend(8, 1, &hint("sub", &folder.join("sub"))), "a folder");
        assert!(!upper.lend(8, 1, &hint("fifo", &folder.join("fifo"))), "a fifo");
        assert!(!upper.lend(8, 1, &hint("sub/file", &secret)), "another inode");
        assert!(!upper.lend(8, 1, b"short"));
        let none = Upper::open(None).unwrap();
        assert!(!none.lend(7, 1, &hint("sub/file", &inside)), "there is no upper folder");
    }

    #[test]
    fn a_file_is_open_while_a_handle_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let upper = Upper::open(Some(dir.path())).unwrap();
        let hint = hint("file", &dir.path().join("file"));
        assert!(upper.lend(7, 1, &hint) && upper.lend(7, 2, b"known by its node"));
        upper.release(7, 3);
        upper.release(7, 1);
        let used = upper.find(7).unwrap();
        upper.release(7, 2);
        assert!(upper.find(7).is_none());
        assert_eq!(upper.permits.taken(), 1, "by who still works on it");
        drop(used);
        assert_eq!(upper.permits.taken(), 0);
    }

    #[test]
    fn no_more_files_are_opened_than_may_be() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let upper = Upper::open(Some(dir.path())).unwrap();
        let hint = hint("file", &dir.path().join("file"));
        let mut all: Vec<_> = std::iter::from_fn(|| upper.permits.take()).collect();
        assert!(!upper.lend(7, 1, &hint));
        all.pop();
        assert!(upper.lend(7, 1, &hint));
    }

    #[test]
    fn a_failed_sync_is_told_to_each_handle_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let upper = Upper::open(Some(dir.path())).unwrap();
        let hint = hint("file", &dir.path().join("file"));
        assert!(upper.lend(7, 1, &hint) && upper.lend(7, 2, &hint));
        let sync = |handle, done| upper.synced(7, handle, done, "elsewhere");
        assert_eq!(sync(1, Ok(())), Ok(()));
        assert_eq!(sync(1, Err("here")), Err("here"));
        assert!(upper.lend(7, 3, &hint));
        assert_eq!(
            [1, 2, 2, 3].map(|handle| sync(handle, Ok(()))),
            [Ok(()), Err("elsewhere"), Ok(()), Ok(())]
        );
        assert_eq!(upper.synced(8, 1, Err("here"), "elsewhere"), Err("here"), "not lent");
    }
}
