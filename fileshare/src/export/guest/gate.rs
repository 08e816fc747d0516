//! Standing still: while a gate is shut, nothing that comes over an export changes a file.
//!
//! ```text
//!            shut: waits for who is inside              open
//!   open ──────────────────────────────────────> shut ─────────> open
//!                                                 └ who wants in waits, and is told EBUSY after a while
//! ```
//!
//! A container that stands still, so that its changes can be read, is not changed from the host either.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use crate::export::wire::abi::op;

/// How long a change waits. The host gives a guest up that is silent for longer than twice as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lets changes in, or not. Several servers may have the same one.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    shut: bool,
    inside: usize,
}

/// Changes are still being made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("changes from the host do not end within {} s", .0.as_secs())]
pub struct StillMoving(Duration);

/// Somebody is inside until this is dropped.
#[derive(Debug)]
pub(super) struct Pass<'a>(&'a Gate);

impl Gate {
    /// Lets nobody in any more, and waits until nobody is inside. Who fails leaves it open.
    ///
    /// # Errors
    /// Somebody stays inside for longer than `limit`.
    pub fn shut(&self, limit: Duration) -> Result<(), StillMoving> {
        let mut state = self.state();
        state.shut = true;
        let wait = self.moved.wait_timeout_while(state, limit, |state| state.inside > 0);
        let (mut state, wait) = wait.unwrap_or_else(PoisonError::into_inner);
        if wait.timed_out() {
            state.shut = false;
            self.moved.notify_all();
            return Err(StillMoving(limit));
        }
        Ok(())
    }

    /// Lets all in again.
    pub fn open(&self) {
        self.state().shut = false;
        self.moved.notify_all();
    }

    /// Waits until the request may be done.
    pub(super) fn enter(&self, opcode: u32) -> Result<Option<Pass<'_>>, Errno> {
        if only_looks(opcode) { Ok(None) } else { self.enter_within(PATIENCE).map(Some) }
    }

    fn enter_within(&self, limit: Duration) -> Result<Pass<'_>, Errno> {
        let wait = self.moved.wait_timeout_while(self.state(), limit, |state| state.shut);
        let (mut state, _) = wait.unwrap_or_else(PoisonError::into_inner);
        if state.shut {
            return Err(Errno::BUSY);
        }
        state.inside += 1;
        Ok(Pass(self))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.state().inside -= 1;
        self.0.moved.notify_all();
    }
}

/// Whether a request changes nothing that a commit would see. Opening is not among them: opening to write copies a
/// lower file up. What is not known here counts as a change.
fn only_looks(opcode: u32) -> bool {
    matches!(
        opcode,
        op::LOOKUP
            | op::FIND
            | op::FORGET
            | op::BATCH_FORGET
            | op::GETATTR
            | op::READLINK
            | op::STATFS
            | op::READ
            | op::OPEN_READ
            | op::OPENDIR_READ
            | op::READDIR
            | op::READDIRPLUS
            | op::RELEASE
            | op::RELEASEDIR
            | op::GETXATTR
            | op::LISTXATTR
            | op::FLUSH
            | op::FSYNC
            | op::FSYNCDIR
            | op::SYNCFS
            | op::LSEEK
            | op::GETLK
            | op::SETLK
            | op::INTERRUPT
            | op::SIGN
    )
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const LATE: Duration = Duration::from_secs(20);

    #[test]
    fn changes_wait_at_a_shut_gate_and_looking_does_not() {
        let gate = Gate::default();
        gate.shut(LATE).unwrap();
        assert!(gate.enter(op::READ).unwrap().is_none());
        assert!(gate.enter(op::SIGN).unwrap().is_none(), "who stands still is alive");
        assert_eq!(gate.enter_within(SOON).unwrap_err(), Errno::BUSY);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.enter_within(LATE).is_ok());
            gate.open();
            assert!(waiting.join().unwrap());
        });
        assert!(gate.enter(op::WRITE).unwrap().is_some());
    }

    #[test]
    fn shutting_waits_for_who_is_inside() {
        let gate = Gate::default();
        let pass = gate.enter(op::WRITE).unwrap();
        assert_eq!(gate.shut(SOON), Err(StillMoving(SOON)));
        assert!(gate.enter_within(SOON).is_ok(), "who could not shut it leaves it open");
        thread::scope(|scope| {
            let shutting = scope.spawn(|| gate.shut(LATE));
            drop(pass);
            assert_eq!(shutting.join().unwrap(), Ok(()));
        });
    }
}
