//! A commit that is not wanted any more: ^C, or the end of its terminal or session.
//!
//! ```text
//!   signal ── the commit's future is dropped ─┬─ the container goes on, the lease takes what containerd has
//!                                             └─ Wanted goes ── threads end at their next step
//! ```
//!
//! Invariant: what was interrupted leaves no more than a commit that failed.

use std::io;
use std::sync::{Arc, Weak};

use anyhow::anyhow;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{Exit, Failure};

/// The signals that ask for the end.
pub struct Interrupt([Signal; 3]);

impl Interrupt {
    /// From now on none of them ends the process.
    pub fn listen() -> io::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Self([interrupt?, terminate?, hangup?]))
    }

    /// Waits for one.
    pub async fn asked(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// What an interrupted commit says.
pub fn interrupted() -> Failure {
    Failure::failed(anyhow!("Interrupted: what was not finished was taken back")).with(Exit::Interrupted)
}

/// As long as it is there, somebody waits for what the commit's threads do.
#[derive(Default)]
pub struct Wanted(Arc<()>);

impl Wanted {
    /// Asks, from another thread, whether to go on.
    pub fn asker(&self) -> impl Fn() -> io::Result<()> + Send + use<> {
        let wanted: Weak<()> = Arc::downgrade(&self.0);
        move || wanted.upgrade().map(drop).ok_or_else(|| io::Error::from(io::ErrorKind::Interrupted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_goes_on_until_nobody_wants_it() {
        let wanted = Wanted::default();
        let go_on = wanted.asker();
        assert!(go_on().is_ok());
        drop(wanted);
        assert!(go_on().is_err());
    }
}
