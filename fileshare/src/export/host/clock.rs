//! When which node was last changed, for answers that are kept: whether they are still true.
//!
//! Time is a count of changes. An answer is kept with the time before it was asked for. A change is noted twice,
//! before it is asked for and after it is answered, so that an answer from between is never taken for new.

use std::sync::atomic::{AtomicU64, Ordering};

/// Nodes share places by their number: a collision only makes an answer look old.
const PLACES: usize = 4096;

#[derive(Debug)]
pub(super) struct Clock {
    changed: Vec<AtomicU64>,
    now: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { changed: (0..PLACES).map(|_| AtomicU64::new(0)).collect(), now: AtomicU64::new(1) }
    }
}

impl Clock {
    pub(super) fn now(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }

    /// A node is about to change, or just did.
    pub(super) fn note(&self, nodeid: u64) {
        // First the node, then the time: who sees the new time sees the change.
        self.place(nodeid).fetch_max(self.now(), Ordering::AcqRel);
        self.now.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether a node was changed at this time or later.
    pub(super) fn is_changed(&self, nodeid: u64, since: u64) -> bool {
        self.place(nodeid).load(Ordering::Acquire) >= since
    }

    fn place(&self, nodeid: u64) -> &AtomicU64 {
        &self.changed[nodeid as usize % PLACES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_before_a_change_is_old() {
        let clock = Clock::default();
        let before = clock.now();
        clock.note(7);
        assert!(clock.is_changed(7, before) && !clock.is_changed(8, before));
        let between = clock.now();
        assert!(!clock.is_changed(7, between), "the change is not answered yet, but may be done");
        clock.note(7);
        assert!(clock.is_changed(7, between) && !clock.is_changed(7, clock.now()));
    }
}
