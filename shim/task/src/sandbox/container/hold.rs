//! Standing still while somebody reads the container's changes from its upper.
//!
//! ```text
//!            hold: flush, freeze, flush               release, VM's end: thaw what hold froze
//!   free ────────────────────────────────────> held ────────────────────────────────────────> free
//!                  └─ fails: thawed at once
//! ```
//!
//! Invariant: nobody but the holder ends a hold, so nothing is written behind the reader's back: while it
//! lasts, containerd's start, pause and resume are refused. Killing and deleting are not.

use std::time::{Duration, Instant};

use tonic::Streaming;
use vmctr_proto::agent::{Empty, UpperChunk};

use super::{CALL_LIMIT, Container};
use crate::error::{Result, TaskError};
use crate::sandbox::process::Phase;

/// Writing back all that a guest's memory may hold.
pub(super) const FLUSH_LIMIT: Duration = Duration::from_secs(60);

/// A hold that lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    number: u64,
    /// When the hold froze the processes, if it was the hold that did.
    froze: Option<Instant>,
}

impl Container {
    /// Freezes the processes that run, if wished, and writes the guest's changes to the share. A
    /// container whose VM has ended has nothing to write. Tells the hold's number.
    pub async fn hold(&mut self, freeze: bool) -> Result<u64> {
        self.check_not_held()?;
        let running = self.session.is_some() && self.init()?.process.phase() == Phase::Running;
        if freeze && running {
            // What the host has to write is written while the processes run: little is left for the pause.
            self.flush().await?;
        }
        let froze = (freeze && running).then(Instant::now);
        if froze.is_some() {
            self.freeze_in_guest().await?;
        }
        if let Err(error) = self.flush().await {
            if froze.is_some() {
                // The flush's error is the one to report; a guest that cannot thaw either is lost anyway.
                let _ = self.thaw_in_guest().await;
            }
            return Err(error);
        }
        self.holds += 1;
        self.held = Some(Held { number: self.holds, froze });
        Ok(self.holds)
    }

    /// Ends a hold: what it froze runs on. Tells how long that stood still.
    pub async fn release(&mut self, number: u64) -> Result<Duration> {
        let held = self
            .held
            .take_if(|held| held.number == number)
            .ok_or_else(|| TaskError::FailedPrecondition("the container was let go before".into()))?;
        let Some(since) = held.froze else { return Ok(Duration::ZERO) };
        if self.session.is_some() && self.is_live() {
            self.thaw_in_guest().await?;
        }
        Ok(since.elapsed())
    }

    /// Begins to read the upper folder that the container keeps in the guest.
    pub async fn read_upper(&self) -> Result<Streaming<UpperChunk>> {
        let container = self.container_ref();
        let session = self.live_session()?;
        let read = |mut agent: vmctr_vmm::vm::Agent| async move { agent.read_upper(container).await };
        Ok(session.agent().call("send its changes", CALL_LIMIT, read).await?)
    }

    /// Begins to read the root as the container's processes see it.
    pub async fn read_merged(&self) -> Result<Streaming<UpperChunk>> {
        let container = self.container_ref();
        let ended = || TaskError::NotFound("the container's VM has ended".into());
        let session = self.session.as_ref().ok_or_else(ended)?;
        let read = |mut agent: vmctr_vmm::vm::Agent| async move { agent.read_merged(container).await };
        Ok(session.agent().call("send its root", CALL_LIMIT, read).await?)
    }

    /// Fails while somebody holds the container.
    pub(super) fn check_not_held(&self) -> Result<()> {
        match self.held {
            None => Ok(()),
            Some(_) => Err(TaskError::FailedPrecondition(
                "the container's changes are being read (commit); try again when that has ended".into(),
            )),
        }
    }

    pub(super) async fn flush(&self) -> Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        session
            .agent()
            .call("write its files back", FLUSH_LIMIT, |mut agent| async move { agent.flush(Empty {}).await })
            .await?;
        Ok(())
    }

    pub(super) async fn freeze_in_guest(&self) -> Result<()> {
        let container = self.container_ref();
        let session = self.live_session()?;
        let pause = |mut agent: vmctr_vmm::vm::Agent| async move { agent.pause(container).await };
        session.agent().call("freeze the container", CALL_LIMIT, pause).await?;
        Ok(())
    }

    pub(super) async fn thaw_in_guest(&self) -> Result<()> {
        let container = self.container_ref();
        let session = self.live_session()?;
        let resume = |mut agent: vmctr_vmm::vm::Agent| async move { agent.resume(container).await };
        session.agent().call("thaw the container", CALL_LIMIT, resume).await?;
        Ok(())
    }
}
