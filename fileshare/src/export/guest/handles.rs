//! Open files and folders, by the number that the host holds.
//!
//! Invariant: a handle answers only for the node that it was opened for.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::io::{Errno, Result};

use super::nodes::Node;

/// An open file or folder.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) node: Arc<Node>,
    pub(super) file: OwnedFd,
    /// Whether it was opened for writing.
    pub(super) writable: bool,
    /// Where the folder's next entry is read; held while reading.
    pub(super) position: Mutex<u64>,
}

impl Handle {
    pub(super) fn new(node: Arc<Node>, file: OwnedFd, writable: bool) -> Self {
        Self { node, file, writable, position: Mutex::new(0) }
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
