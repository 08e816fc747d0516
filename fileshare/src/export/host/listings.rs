//! Which folders the kernel may keep a listing of.
//!
//! ```text
//!   reader A: opened ── reads in the kernel's listing ─────────────────────────── reads on there
//!   a name is changed        ·
//!   reader B:                     opened: makes no new listing ── reads ── closed
//! ```
//!
//! The kernel has one listing for all. If B made a new one, A would go on in the guest, at a place that was counted
//! before the change: names would be missing.
//!
//! Invariant: a folder that somebody has open since before a change is opened to others without the kernel's listing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Mutex;

use super::clock::Clock;
use super::shared::lock;

/// The folders that are open.
#[derive(Debug, Default)]
pub(super) struct Listings {
    open: Mutex<HashMap<u64, Open>>,
    /// Of which names folders have.
    names: Clock,
}

/// One of them.
#[derive(Debug)]
struct Open {
    count: u64,
    /// When nobody had it open.
    since: u64,
}

impl Listings {
    /// A name in a folder is about to change, or just did.
    pub(super) fn note(&self, folder: u64) {
        self.names.note(folder);
    }

    /// A folder is opened; whether the kernel may make a listing of it.
    pub(super) fn opened(&self, folder: u64) -> bool {
        match lock(&self.open).entry(folder) {
            Entry::Vacant(none) => {
                none.insert(Open { count: 1, since: self.names.now() });
                true
            }
            Entry::Occupied(mut open) => {
                open.get_mut().count += 1;
                !self.names.is_changed(folder, open.get().since)
            }
        }
    }

    /// A folder was closed.
    pub(super) fn closed(&self, folder: u64) {
        if let Entry::Occupied(mut open) = lock(&self.open).entry(folder) {
            open.get_mut().count -= 1;
            if open.get().count == 0 {
                open.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_since_before_a_change_keeps_what_is_read() {
        let listings = Listings::default();
        assert!(listings.opened(7) && listings.opened(7), "nothing has changed");
        listings.closed(7);
        listings.note(7);
        assert!(!listings.opened(7) && listings.opened(8));
        listings.closed(7);
        assert!(!listings.opened(7), "the first one still reads");
        (0..2).for_each(|_| listings.closed(7));
        listings.closed(7);
        assert!(listings.opened(7));
        assert_eq!(lock(&listings.open).len(), 2);
    }
}
