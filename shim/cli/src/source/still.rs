//! A container's standing still, ended by whoever has read the last of its changes.
//!
//! Invariant: when all copies are gone, or this process is, the shim lets the container run on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::control::{Error, Hold};

/// Copies share the hold.
#[derive(Clone)]
pub struct Still(Arc<Mutex<State>>);

struct State {
    hold: Option<Hold>,
    frozen: Duration,
}

impl Still {
    /// Standing still by this hold; without one nothing runs.
    pub(super) fn of(hold: Option<Hold>) -> Self {
        Self(Arc::new(Mutex::new(State { hold, frozen: Duration::ZERO })))
    }

    /// Lets the container run on, unless it was let before. Fails if it ran on by itself, or cannot.
    pub async fn release(&self) -> Result<(), Error> {
        let hold = self.with(|state| state.hold.take());
        if let Some(hold) = hold {
            let frozen = hold.release().await?;
            self.with(|state| state.frozen = frozen);
        }
        Ok(())
    }

    /// Whether it stands still, so that somebody waits.
    pub fn holds(&self) -> bool {
        self.with(|state| state.hold.is_some())
    }

    /// How long it was frozen, as its shim measured; zero if it was not, or still is.
    pub fn frozen(&self) -> Duration {
        self.with(|state| state.frozen)
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
