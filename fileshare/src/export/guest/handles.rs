//! Open files and folders, by the number that the host holds.
//!
//! Invariant: a handle answers only for the node that it was opened for.
//!
//! A file that is lent to the host is open here only when something has to be done here after all.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use rustix::fs::OFlags;
use rustix::io::{Errno, Result};

use super::lend::forget_contents;
use super::nodes::Node;
use super::room::Room;

/// An open file or folder.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) node: Arc<Node>,
    file: OnceLock<OwnedFd>,
    /// What it is opened with.
    flags: OFlags,
    /// Whether the host may write to the file by itself while this is open.
    lent: bool,
    /// Whether it was opened for writing.
    pub(super) writable: bool,
    /// Where the folder's next entry is read; held while reading.
    pub(super) position: Mutex<u64>,
    /// Whose fcntl locks were asked for through it.
    owners: Mutex<HashSet<u64>>,
}

impl Handle {
    pub(super) fn new(node: Arc<Node>, file: OwnedFd, writable: bool) -> Self {
        let (file, flags) = (OnceLock::from(file), OFlags::empty());
        Self { node, file, flags, lent: false, writable, position: Mutex::new(0), owners: Mutex::default() }
    }

    /// Of a file that is lent to be written to, open or to be opened with `flags`.
    pub(super) fn lent(node: Arc<Node>, file: Option<OwnedFd>, flags: OFlags) -> Self {
        node.lent.lend();
        let file = file.map(OnceLock::from).unwrap_or_default();
        Self {
            node,
            file,
            flags,
            lent: true,
            writable: true,
            position: Mutex::new(0),
            owners: Mutex::default(),
        }
    }

    /// The open file, of which this kernel remembers nothing that the host has changed.
    pub(super) fn file(&self, room: &Room) -> Result<&OwnedFd> {
        let file = self.file_to_lock(room)?;
        self.node.lent.with_contents(|| forget_contents(file))?;
        Ok(file)
    }

    /// The open file, for what asks for nothing of its contents.
    pub(super) fn file_to_lock(&self, room: &Room) -> Result<&OwnedFd> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = room.with(|| self.node.open(self.flags))?;
        // What was lent may have been forgotten, and found again.
        forget_contents(&file)?;
        // Two at once: one of theirs is closed again.
        Ok(self.file.get_or_init(|| file))
    }

    /// Those who asked for fcntl locks through it.
    pub(super) fn owners(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host has closed it.
    pub(super) fn closed(&self) {
        if self.lent {
            self.node.lent.returned();
        }
    }
}

/// The open files.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    last: AtomicU64,
}

impl Handles {
    pub(super) fn add(&self, handle: Handle) -> u64 {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(id, Arc::new(handle));
        id
    }

    pub(super) fn find(&self, id: u64, node: u64) -> Result<Arc<Handle>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&id).filter(|handle| handle.node.id == node).cloned().ok_or(Errno::BADF)
    }

    pub(super) fn remove(&self, id: u64, node: u64) -> Option<Arc<Handle>> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        match open.get(&id) {
            Some(handle) if handle.node.id == node => open.remove(&id),
            _ => None,
        }
    }
}
