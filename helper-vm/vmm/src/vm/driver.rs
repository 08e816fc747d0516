//! The task that owns a VM: its state, QEMU's process, the monitor. Everyone else sends [`Request`]s.
//!
//! ```text
//!   requests ──┐
//!   QEMU's end ┴──> driver ──> state (watch)
//!                       └────> QMP stop, cont; SIGKILL
//! ```

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::agent::hello;
use super::boot::{boot, move_to};
use super::qemu_process::QemuProcess;
use super::{Agent, Started, VmError, VmStart, VmState};
use crate::error_chain::error_chain;
use crate::qemu::command::{late_share, union_device, union_share};
use crate::qmp::Qmp;
use crate::spec::Machine;
use crate::vsock::UnixServer;

/// Requests that may wait.
pub(super) const QUEUE: usize = 16;

/// To set the guest's clock after a pause.
const CLOCK_LIMIT: Duration = Duration::from_secs(5);

/// Where a request's result goes.
pub(super) type Answer = oneshot::Sender<Result<(), VmError>>;

/// What a handle can ask for.
#[derive(Debug)]
pub(super) enum Request {
    Pause(Answer),
    Resume(Answer),
    PlugShare(Answer),
    PlugUnion(u32, OwnedFd, Answer),
    UnplugUnion(u32, Answer),
    Stop(Answer),
}

/// The driver before and after QEMU lives.
pub(super) struct Driver {
    state: watch::Sender<VmState>,
    requests: mpsc::Receiver<Request>,
}

/// What the driver owns while QEMU lives.
pub(super) struct Running {
    pub qemu: QemuProcess,
    pub qmp: Qmp,
    pub agent: Agent,
    pub machine: Machine,
    /// Removes its socket file when dropped.
    pub _vsock_socket: UnixServer,
}

/// What happened next.
enum Step {
    Request(Option<Request>),
    /// QEMU ended, or broke its monitor and was killed for it.
    End(VmError),
}

/// How the VM's life ended.
enum Last {
    Stopped(Option<Answer>),
    Failed(VmError),
}

impl Driver {
    pub(super) fn new(state: watch::Sender<VmState>, requests: mpsc::Receiver<Request>) -> Self {
        Self { state, requests }
    }

    /// The VM's whole life.
    pub(super) async fn run(mut self, start: VmStart, mut answer: oneshot::Sender<Result<Started, VmError>>) {
        let booted = tokio::select! {
            booted = boot(start, &self.state) => booted,
            () = answer.closed() => Err(VmError::GivenUp),
        };
        match booted {
            Ok((running, started)) => {
                // With nobody to take the VM, its handle's channel is closed, which ends it.
                let _ = answer.send(Ok(started));
                self.drive(running).await;
            }
            Err(error) => {
                self.fail(&error);
                let _ = answer.send(Err(error));
            }
        }
    }

    async fn drive(&mut self, mut running: Running) {
        let last = loop {
            match self.next(&mut running).await {
                Step::Request(Some(Request::Pause(answer))) => {
                    let _ = answer.send(self.pause(&mut running.qmp).await);
                }
                Step::Request(Some(Request::Resume(answer))) => {
                    let _ = answer.send(self.resume(&mut running).await);
                }
                Step::Request(Some(Request::PlugShare(answer))) => {
                    let share = late_share(running.machine);
                    let plugged = running.qmp.device_add(share).await;
                    let _ = answer.send(plugged.map_err(VmError::from));
                }
                Step::Request(Some(Request::PlugUnion(port, share, answer))) => {
                    let _ = answer.send(plug_union(&mut running, port, share).await);
                }
                Step::Request(Some(Request::UnplugUnion(port, answer))) => {
                    let _ = answer.send(unplug_union(&mut running.qmp, port).await);
                }
                Step::Request(Some(Request::Stop(answer))) => match running.qemu.kill().await {
                    Ok(()) => break Last::Stopped(Some(answer)),
                    Err(error) => {
                        let _ = answer.send(Err(error));
                    }
                },
                Step::Request(None) => {
                    if let Err(error) = running.qemu.kill().await {
                        tracing::error!("{}", error_chain(&error));
                    }
                    break Last::Stopped(None);
                }
                Step::End(error) => break Last::Failed(error),
            }
        };
        drop(running);
        self.finish(last).await;
    }

    /// QEMU is reaped and the VM's socket removed.
    async fn finish(&mut self, last: Last) {
        match last {
            Last::Stopped(answer) => {
                self.state.send_replace(VmState::Stopped);
                if let Some(answer) = answer {
                    let _ = answer.send(Ok(()));
                }
            }
            Last::Failed(error) => self.fail(&error),
        }
        self.refuse_requests().await;
    }

    async fn next(&mut self, running: &mut Running) -> Step {
        let Running { qemu, qmp, .. } = running;
        let broken = tokio::select! {
            request = self.requests.recv() => return Step::Request(request),
            broken = qmp.broken() => Some(broken),
            _ = qemu.child.wait() => None,
        };
        let state = self.state.borrow().clone();
        let Some(broken) = broken else { return Step::End(qemu.end(state, Some(qmp)).await) };
        if let Some(end) = qemu.end_soon(state, Some(qmp)).await {
            return Step::End(end);
        }
        if let Err(error) = qemu.kill().await {
            tracing::error!("{}", error_chain(&error));
        }
        Step::End(broken.into())
    }

    async fn pause(&self, qmp: &mut Qmp) -> Result<(), VmError> {
        let next = self.state.borrow().to(VmState::Paused)?;
        qmp.stop().await?;
        move_to(&self.state, next)
    }

    async fn resume(&self, running: &mut Running) -> Result<(), VmError> {
        let next = self.state.borrow().to(VmState::Running)?;
        running.qmp.cont().await?;
        move_to(&self.state, next)?;
        // The guest's clock stood still, maybe for days.
        let told = timeout(CLOCK_LIMIT, hello(&mut running.agent)).await;
        told.map_err(|_| VmError::Clock(CLOCK_LIMIT))?.map(drop)
    }

    fn fail(&self, error: &VmError) {
        let reason = error_chain(error);
        tracing::warn!("VM failed: {reason}");
        self.state.send_replace(VmState::Failed(reason));
    }

    /// A VM that is over can still be stopped, which does nothing.
    async fn refuse_requests(&mut self) {
        while let Some(request) = self.requests.recv().await {
            let (answer, result) = match request {
                Request::Stop(answer) => (answer, Ok(())),
                Request::Pause(answer) => (answer, self.state.borrow().to(VmState::Paused).map(drop)),
                Request::Resume(answer)
                | Request::PlugShare(answer)
                | Request::PlugUnion(_, _, answer)
                | Request::UnplugUnion(_, answer) => {
                    (answer, self.state.borrow().to(VmState::Running).map(drop))
                }
            };
            let _ = answer.send(result.map_err(VmError::from));
        }
    }
}

async fn plug_union(running: &mut Running, port: u32, share: OwnedFd) -> Result<(), VmError> {
    let (qmp, name) = (&mut running.qmp, union_device(port));
    qmp.forget_deleted(&name);
    qmp.add_socket(&name, share).await?;
    if let Err(error) = qmp.device_add(union_share(running.machine, port)).await {
        qmp.remove_socket(&name).await?;
        return Err(error.into());
    }
    Ok(())
}

async fn unplug_union(qmp: &mut Qmp, port: u32) -> Result<(), VmError> {
    let name = union_device(port);
    qmp.device_deleted(&name).await?;
    Ok(qmp.remove_socket(&name).await?)
}
