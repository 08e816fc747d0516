//! Files and folders that the kernel has open and the guest has not, or not yet.
//!
//! ```text
//!   open for reading ──> handle of ours, no request ── first read ──> OPEN_READ    ── more to read ──> guest's handle
//!   open a folder    ──> handle of ours, no request ── first list ──> OPENDIR_READ ──> guest's handle, entries ahead
//! ```
//!
//! What the kernel has in its cache is never asked for, so a second reading of a tree costs no turn at all.
//!
//! Invariant: nodes in a listing that the kernel did not take are forgotten in its place; the memory for
//! listings is bounded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::check::{HANDLES, entries};
use super::shared::lock;
use super::shortcut::HostFile;
use super::upper::UpperFile;

/// What all listings together may hold.
const MOST_AHEAD: usize = 32 << 20;

/// The open files and folders that have a handle of ours.
#[derive(Debug, Default)]
pub(super) struct Lazies {
    open: Mutex<HashMap<u64, Arc<Lazy>>>,
    last: AtomicU64,
    ahead: AtomicUsize,
}

/// One of them.
#[derive(Debug, Default)]
pub(super) struct Lazy {
    pub(super) state: Mutex<State>,
}

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The guest's handle.
    pub(super) guest: Option<u64>,
    /// The file itself, where it can be read here.
    pub(super) host: Option<Arc<HostFile>>,
    /// The same of a file that lies in the upper folder.
    pub(super) upper: Option<Arc<UpperFile>>,
    /// What was listed and not yet taken.
    pub(super) ahead: Option<Ahead>,
    /// It is listed on the host, and so to its end.
    pub(super) begun: bool,
    /// Entries given to the kernel since the folder's start.
    pub(super) listed: u64,
}

/// A listing, ahead of the kernel's asking.
#[derive(Debug)]
pub(super) struct Ahead {
    entries: Vec<u8>,
    at: usize,
    /// The offset at which the kernel will ask for the next.
    next: u64,
    whole: bool,
    /// [`super::shared::Shared::changes`] when it was asked for.
    changes: u64,
}

impl Lazies {
    pub(super) fn add(&self) -> u64 {
        let handle = HANDLES | self.last.fetch_add(1, Ordering::Relaxed);
        lock(&self.open).insert(handle, Arc::default());
        handle
    }

    pub(super) fn find(&self, handle: u64) -> Option<Arc<Lazy>> {
        if handle < HANDLES { None } else { lock(&self.open).get(&handle).cloned() }
    }

    pub(super) fn remove(&self, handle: u64) -> Option<Arc<Lazy>> {
        lock(&self.open).remove(&handle)
    }

    /// Keeps a listing, if there is room; else gives it back.
    pub(super) fn keep(&self, state: &mut State, ahead: Ahead) -> Option<Ahead> {
        let size = ahead.entries.len();
        if self.ahead.fetch_add(size, Ordering::Relaxed) + size > MOST_AHEAD {
            self.ahead.fetch_sub(size, Ordering::Relaxed);
            return Some(ahead);
        }
        let replaced = self.drop_ahead(state);
        state.ahead = Some(ahead);
        replaced
    }

    /// Gives up what was listed ahead.
    pub(super) fn drop_ahead(&self, state: &mut State) -> Option<Ahead> {
        let ahead = state.ahead.take()?;
        self.ahead.fetch_sub(ahead.entries.len(), Ordering::Relaxed);
        Some(ahead)
    }
}

impl Ahead {
    pub(super) fn new(entries: &[u8], offset: u64, whole: bool, changes: u64) -> Self {
        Self { entries: entries.to_vec(), at: 0, next: offset, whole, changes }
    }

    /// The entries that the kernel asks for at `offset`, at most `size` bytes; `None` when they are not here.
    pub(super) fn take(&mut self, offset: u64, size: usize, changes: u64) -> Option<&[u8]> {
        let start = self.at;
        if offset != self.next || changes != self.changes || (start == self.entries.len() && !self.whole) {
            return None;
        }
        for entry in entries(&self.entries[start..]) {
            if self.at + entry.length - start > size {
                break;
            }
            self.at += entry.length;
            self.next = entry.next;
        }
        Some(&self.entries[start..self.at])
    }

    /// The nodes that the kernel was not told of.
    pub(super) fn untold(&self) -> Vec<u64> {
        entries(&self.entries[self.at..]).map(|entry| entry.nodeid).filter(|nodeid| *nodeid != 0).collect()
    }
}
