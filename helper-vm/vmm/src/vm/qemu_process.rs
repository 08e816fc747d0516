//! QEMU's process and what it and its guest say.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use tokio::process::Child;
use tokio::time::timeout;

use super::error::End;
use super::{VmError, VmState};
use crate::console::Console;
use crate::jail;
use crate::qmp::Qmp;

/// A child of this process. Dropping it kills QEMU; it is then reaped in the background.
#[derive(Debug)]
pub(crate) struct QemuProcess {
    pub child: Child,
    /// The guest's serial console.
    pub console: Console,
    /// QEMU's own stderr.
    pub stderr: Console,
}

impl QemuProcess {
    /// Waits for the end, then says how it came. Cancel safe until QEMU has exited.
    pub(crate) async fn end(&mut self, state: VmState, qmp: Option<&mut Qmp>) -> VmError {
        let status = self.child.wait().await;
        self.console.drain().await;
        self.stderr.drain().await;
        let qemu = self.stderr.last_words();
        let code = status.as_ref().ok().and_then(ExitStatus::code);
        // Whoever killed QEMU with a signal, the guest has nothing to say about it.
        let guest = code.and_then(|_| self.console.last_words());
        if code == Some(jail::EXIT_STATUS) {
            return VmError::Jail(qemu.unwrap_or_default());
        }
        let shutdown = match qmp {
            Some(qmp) => last_event(qmp).await,
            None => None,
        };
        let status =
            status.map_or_else(|error| format!("status unknown: {error}"), |status| status.to_string());
        VmError::Ended(End { state, status, shutdown, qemu, guest })
    }

    /// As [`Self::end`], for a QEMU whose connection just broke; `None` when it lives on.
    pub(crate) async fn end_soon(&mut self, state: VmState, qmp: Option<&mut Qmp>) -> Option<VmError> {
        const LIMIT: Duration = Duration::from_secs(1);
        match timeout(LIMIT, self.child.wait()).await {
            Ok(_) => Some(self.end(state, qmp).await),
            Err(_) => None,
        }
    }

    /// SIGKILL, then reaps it.
    pub(crate) async fn kill(&mut self) -> Result<(), VmError> {
        /// The kernel frees the guest's memory in this time.
        const LIMIT: Duration = Duration::from_secs(10);
        let error = |source| VmError::Host { action: "kill QEMU", source };
        match timeout(LIMIT, self.child.kill()).await {
            Ok(killed) => killed.map_err(error),
            Err(_) => Err(error(io::Error::from(io::ErrorKind::TimedOut))),
        }
    }
}

/// What QEMU's monitor said last; QEMU is gone, so its end is near.
async fn last_event(qmp: &mut Qmp) -> Option<String> {
    const LIMIT: Duration = Duration::from_millis(500);
    // Too late and broken mean the same: what was read so far must do.
    let _ = timeout(LIMIT, qmp.broken()).await;
    qmp.shutdown().map(str::to_owned)
}
