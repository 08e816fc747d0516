//! The start of a VM, phase by phase.
//!
//! ```text
//!   boot      spawn ──────────────────────────> boot ──> hello
//!   template  spawn ──> restore ──> resume ────────────> hello
//!             └ copy of the memory ┘
//! ```

use std::io;
use std::time::Instant;

use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_blocking};
use vmctr_proto::agent::HelloReply;
use vmctr_proto::ports;

use super::attempt::Attempt;
use super::driver::Running;
use super::launch::{Job, Launch, boot_files, host, restore_files, serve_vsock};
use super::{Agent, Origin, Phase, Started, VmError, VmStart, VmState, agent};
use crate::guest_files::GuestFiles;
use crate::qemu::command::{STATE_URI, late_share, late_vsock};
use crate::qmp::Qmp;
use crate::run_dir::Role;
use crate::template::TemplateError;
use crate::vsock::{Listener, UnixServer, VsockHost};

/// Takes a VM from `Spec` to `Running`. On an error QEMU is killed and reaped.
pub(super) async fn boot(
    mut start: VmStart,
    state: &watch::Sender<VmState>,
) -> Result<(Running, Started), VmError> {
    move_to(state, VmState::Starting)?;
    let begin = Instant::now();
    let Prepared { files, job, copied } = prepare(&start).await?;
    let (vsock, qemu_vsock) = serve_vsock(&start.run_dir)?;
    // In place before the guest can connect.
    let ready = vsock.listen(ports::READY).map_err(io::Error::other).map_err(host("listen for the guest"))?;
    let share_now = start.share.is_some() && !start.share_later;
    let launch = Launch {
        spec: &start.spec,
        qemu: &start.qemu,
        accelerator: start.accelerator,
        jail: &start.jail,
        files: &files,
        job,
        vsock: Some(qemu_vsock),
        share: start.share.take(),
    };
    let launched = launch.start().await?;
    let pid = launched.pid;
    let (mut attempt, qmp) = Attempt::new(launched, begin, start.boot_timeout, state.subscribe());
    let boot = Boot { attempt: &mut attempt, state, vsock: &vsock, start: &start, share_now };
    let booted = async {
        start.run_dir.record(Role::Qemu, pid)?;
        boot.attempt.spawned(qmp).await?;
        boot.run(ready, files, copied).await
    };
    match booted.await {
        Ok(Booted { vsock_socket, agent, hello }) => {
            let (qemu, qmp, phases) = attempt.finish()?;
            let (spec, accelerator) = (start.spec, start.accelerator);
            let running = Running {
                qemu,
                qmp,
                agent: agent.clone(),
                machine: spec.machine(),
                _vsock_socket: vsock_socket,
            };
            let started = Started { spec, accelerator, qemu_pid: pid, vsock, agent, hello, phases };
            Ok((running, started))
        }
        Err(error) => {
            attempt.kill().await?;
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

/// What there is before QEMU starts.
struct Prepared {
    files: GuestFiles,
    job: Job,
    /// The copy of a template's memory, under way.
    copied: Option<JoinHandle<Result<(), TemplateError>>>,
}

async fn prepare(start: &VmStart) -> Result<Prepared, VmError> {
    match &start.origin {
        Origin::Boot(assets) => {
            let (files, _) = boot_files(assets, &start.spec, false).await?;
            Ok(Prepared { files, job: Job::Boot, copied: None })
        }
        Origin::Template(template) => {
            let (files, ram) = restore_files(&start.spec)?;
            let state = template.open_state().map_err(host("open the template's state"))?;
            template.touch();
            let template = template.clone();
            let copied = spawn_blocking(move || template.copy_ram(&ram));
            Ok(Prepared { files, job: Job::Restore(state), copied: Some(copied) })
        }
    }
}

/// What the phases made.
struct Booted {
    vsock_socket: UnixServer,
    agent: Agent,
    hello: HelloReply,
}

/// A start whose QEMU is up.
struct Boot<'a> {
    attempt: &'a mut Attempt,
    state: &'a watch::Sender<VmState>,
    vsock: &'a VsockHost,
    start: &'a VmStart,
    /// Whether a restored VM has its share before it goes on.
    share_now: bool,
}

impl Boot<'_> {
    async fn run(
        self,
        mut ready: Listener,
        files: GuestFiles,
        copied: Option<JoinHandle<Result<(), TemplateError>>>,
    ) -> Result<Booted, VmError> {
        let waits = match copied {
            None => Phase::Boot,
            Some(copied) => {
                self.attempt.wait(Phase::Copy, copy_done(copied)).await?;
                let (machine, share) = (self.start.spec.machine(), self.share_now);
                let restore = async |qmp: &mut Qmp| {
                    qmp.restore(STATE_URI).await?;
                    qmp.device_add(late_vsock(machine)).await?;
                    if share {
                        qmp.device_add(late_share(machine)).await?;
                    }
                    Ok(qmp.cont().await?)
                };
                self.attempt.control(Phase::Restore, restore).await?;
                Phase::Resume
            }
        };
        let accepted = async { ready.accept().await.map_err(vsock_error) };
        self.attempt.wait(waits, accepted).await?;
        move_to(self.state, VmState::Ready)?;
        files.free().map_err(host("free the guest's files"))?;

        let greeted = agent::greet(self.vsock.clone());
        let (agent, hello) = self.attempt.wait(Phase::Hello, greeted).await?;
        let vsock_socket = self.vsock.serve_unix(&self.start.run_dir.vsock_socket()).map_err(vsock_error)?;
        move_to(self.state, VmState::Running)?;
        Ok(Booted { vsock_socket, agent, hello })
    }
}

async fn copy_done(copied: JoinHandle<Result<(), TemplateError>>) -> Result<(), VmError> {
    let copied = copied.await.map_err(io::Error::other).map_err(host("copy the template's memory"))?;
    copied.map_err(|error| VmError::Template(Box::new(error)))
}

fn vsock_error(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VmError {
    VmError::Host { action: "use the VM's vsock device", source: io::Error::other(error) }
}
