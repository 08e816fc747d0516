//! Connects on their way from the users' threads to the device's worker.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::mux::Connect;

/// The queue. Closed once, for good.
#[derive(Debug, Default)]
pub(super) struct Inbox(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    connects: Vec<Connect>,
    closed: bool,
}

impl Inbox {
    /// Queues a connect; when the inbox is closed it is dropped, which tells the one who waits.
    pub(super) fn put(&self, connect: Connect) {
        let mut state = self.lock();
        if !state.closed {
            state.connects.push(connect);
        }
    }

    /// Takes all; None when the inbox is closed.
    pub(super) fn take(&self) -> Option<Vec<Connect>> {
        let mut state = self.lock();
        (!state.closed).then(|| std::mem::take(&mut state.connects))
    }

    /// Drops what waits and all that is put later.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.connects.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
