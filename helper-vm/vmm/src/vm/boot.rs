//! The start of a VM, phase by phase, each watched for QEMU's end and for the common time limit.

use std::future::Future;
use std::io;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout_at;
use vmctr_proto::agent::HelloReply;

use super::driver::Running;
use super::launch::{Launched, launch};
use super::qemu_process::QemuProcess;
use super::{Agent, Phase, PhaseTime, Started, VmError, VmStart, VmState, agent};
use crate::guest_files::GuestFiles;
use crate::qmp::{Qmp, QmpError};
use crate::run_dir::{Role, RunDir};
use crate::vsock::{Listener, UnixServer, VsockHost};

/// Takes a VM from `Spec` to `Running`. On an error QEMU is killed and reaped.
pub(super) async fn boot(
    mut start: VmStart,
    state: &watch::Sender<VmState>,
) -> Result<(Running, Started), VmError> {
    move_to(state, VmState::Starting)?;
    let clock = Clock::new(start.boot_timeout);
    let Launched { qemu, pid, vsock, qmp, ready, guest_files } = launch(&mut start).await?;
    let mut boot = Boot { state, clock, qemu, qmp: None, vsock, run_dir: &start.run_dir };
    match boot.run(pid, qmp, ready, guest_files).await {
        Ok(Booted { qmp, vsock_socket, agent, hello }) => {
            let Boot { clock, qemu, vsock, .. } = boot;
            let VmStart { spec, accelerator, .. } = start;
            let phases = clock.times;
            let started = Started { spec, accelerator, qemu_pid: pid, vsock, agent, hello, phases };
            Ok((Running { qemu, qmp, _vsock_socket: vsock_socket }, started))
        }
        Err(error) => {
            boot.qemu.kill().await?;
            Err(error)
        }
    }
}

/// Moves the state, which only the driver's task does.
pub(super) fn move_to(state: &watch::Sender<VmState>, next: VmState) -> Result<(), VmError> {
    let next = state.borrow().to(next)?;
    state.send_replace(next);
    Ok(())
}

/// Time since QEMU's start, cut into phases.
struct Clock {
    limit: Duration,
    begin: Instant,
    phase_begin: Instant,
    times: Vec<PhaseTime>,
}

impl Clock {
    fn new(limit: Duration) -> Self {
        let now = Instant::now();
        Self { limit, begin: now, phase_begin: now, times: vec![] }
    }

    fn end(&mut self, phase: Phase) {
        let now = Instant::now();
        self.times.push(PhaseTime { phase, duration: now - self.phase_begin });
        self.phase_begin = now;
    }
}

/// What the phases made.
struct Booted {
    qmp: Qmp,
    vsock_socket: UnixServer,
    agent: Agent,
    hello: HelloReply,
}

/// A start under way.
struct Boot<'a> {
    state: &'a watch::Sender<VmState>,
    clock: Clock,
    qemu: QemuProcess,
    /// From the end of the first phase on.
    qmp: Option<Qmp>,
    vsock: VsockHost,
    run_dir: &'a RunDir,
}

impl Boot<'_> {
    async fn run(
        &mut self,
        pid: u32,
        qmp: UnixStream,
        mut ready: Listener,
        guest_files: GuestFiles,
    ) -> Result<Booted, VmError> {
        self.run_dir.record(Role::Qemu, pid)?;
        let qmp = self.during(Phase::Spawn, async { Ok(Qmp::connect(qmp).await?) }).await?;
        self.qmp = Some(qmp);

        let accepted = async { ready.accept().await.map_err(vsock_error) };
        self.during(Phase::Boot, accepted).await?;
        move_to(self.state, VmState::Ready)?;
        guest_files.free().map_err(|source| VmError::Host { action: "free the guest's files", source })?;

        let vsock = self.vsock.clone();
        let (agent, hello) = self.during(Phase::Hello, agent::greet(vsock)).await?;
        let vsock_socket = self.vsock.serve_unix(&self.run_dir.vsock_socket()).map_err(vsock_error)?;
        move_to(self.state, VmState::Running)?;
        let qmp = self.qmp.take().ok_or(QmpError::Closed)?;
        Ok(Booted { qmp, vsock_socket, agent, hello })
    }

    /// Runs one phase. QEMU's end explains a broken connection better than the connection does.
    async fn during<T>(
        &mut self,
        phase: Phase,
        work: impl Future<Output = Result<T, VmError>>,
    ) -> Result<T, VmError> {
        let deadline = tokio::time::Instant::from_std(self.clock.begin + self.clock.limit);
        let done = tokio::select! {
            done = timeout_at(deadline, work) => done,
            _ = self.qemu.child.wait() => return Err(self.qemu.end(self.now(), self.qmp.as_mut()).await),
        };
        match done {
            Ok(Ok(value)) => {
                self.clock.end(phase);
                Ok(value)
            }
            Ok(Err(error)) => {
                let end = self.qemu.end_soon(self.now(), self.qmp.as_mut()).await;
                Err(end.unwrap_or(error))
            }
            Err(_) => Err(self.too_late(phase)),
        }
    }

    fn now(&self) -> VmState {
        self.state.borrow().clone()
    }

    fn too_late(&self, phase: Phase) -> VmError {
        VmError::TimeLimit { phase, limit: self.clock.limit, last_words: self.qemu.console.last_words() }
    }
}

fn vsock_error(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VmError {
    VmError::Host { action: "use the VM's vsock device", source: io::Error::other(error) }
}
