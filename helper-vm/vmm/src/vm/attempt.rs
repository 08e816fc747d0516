//! A start under way: its phases, each watched for QEMU's end and for the common time limit.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout_at;

use super::launch::Launched;
use super::qemu_process::QemuProcess;
use super::{Phase, PhaseTime, VmError, VmState};
use crate::qmp::{Qmp, QmpError};

/// QEMU and how far it has come. Dropping it kills QEMU.
pub(crate) struct Attempt {
    pub(super) qemu: QemuProcess,
    clock: Clock,
    /// From the end of the first phase on.
    qmp: Option<Qmp>,
    state: watch::Receiver<VmState>,
}

impl Attempt {
    /// Begins when QEMU was started; `begin` is when that began.
    pub(crate) fn new(
        launched: Launched,
        begin: Instant,
        limit: Duration,
        state: watch::Receiver<VmState>,
    ) -> (Self, UnixStream) {
        let Launched { qemu, qmp, .. } = launched;
        let clock = Clock { limit, begin, phase_begin: begin, times: vec![] };
        (Self { qemu, clock, qmp: None, state }, qmp)
    }

    /// Waits until QEMU has set up its devices.
    pub(crate) async fn spawned(&mut self, qmp: UnixStream) -> Result<(), VmError> {
        let connect = async |_: &mut Option<Qmp>| Ok(Qmp::connect(qmp).await?);
        self.qmp = Some(self.during(Phase::Spawn, connect).await?);
        Ok(())
    }

    /// Runs one phase that does not use the monitor.
    pub(super) async fn wait<T>(
        &mut self,
        phase: Phase,
        work: impl Future<Output = Result<T, VmError>>,
    ) -> Result<T, VmError> {
        self.during(phase, async |_: &mut Option<Qmp>| work.await).await
    }

    /// Runs one phase that does.
    pub(crate) async fn control<T>(
        &mut self,
        phase: Phase,
        work: impl AsyncFnOnce(&mut Qmp) -> Result<T, VmError>,
    ) -> Result<T, VmError> {
        let work = async |qmp: &mut Option<Qmp>| match qmp {
            Some(qmp) => work(qmp).await,
            None => Err(QmpError::Closed.into()),
        };
        self.during(phase, work).await
    }

    /// Waits until the guest's console has a line that ends so.
    pub(crate) async fn says(&mut self, phase: Phase, ending: &str) -> Result<(), VmError> {
        let said = self.qemu.console.says(ending);
        let said = async {
            said.await;
            Ok(())
        };
        self.wait(phase, said).await
    }

    /// Ends QEMU.
    pub(crate) async fn kill(&mut self) -> Result<(), VmError> {
        self.qemu.kill().await
    }

    /// What is left when all phases are done.
    pub(super) fn finish(self) -> Result<(QemuProcess, Qmp, Vec<PhaseTime>), VmError> {
        let qmp = self.qmp.ok_or(QmpError::Closed)?;
        Ok((self.qemu, qmp, self.clock.times))
    }

    /// QEMU's end explains a broken connection better than the connection does.
    async fn during<T>(
        &mut self,
        phase: Phase,
        work: impl AsyncFnOnce(&mut Option<Qmp>) -> Result<T, VmError>,
    ) -> Result<T, VmError> {
        let deadline = tokio::time::Instant::from_std(self.clock.begin + self.clock.limit);
        let done = tokio::select! {
            done = timeout_at(deadline, work(&mut self.qmp)) => Some(done),
            _ = self.qemu.child.wait() => None,
        };
        match done {
            Some(Ok(Ok(value))) => {
                self.clock.end(phase);
                Ok(value)
            }
            Some(Ok(Err(error))) => {
                let end = self.qemu.end_soon(self.now(), self.qmp.as_mut()).await;
                Err(end.unwrap_or(error))
            }
            Some(Err(_)) => Err(self.too_late(phase)),
            None => Err(self.qemu.end(self.now(), self.qmp.as_mut()).await),
        }
    }

    fn now(&self) -> VmState {
        self.state.borrow().clone()
    }

    fn too_late(&self, phase: Phase) -> VmError {
        VmError::TimeLimit { phase, limit: self.clock.limit, last_words: self.qemu.console.last_words() }
    }
}

/// Time since the start began, cut into phases.
struct Clock {
    limit: Duration,
    begin: Instant,
    phase_begin: Instant,
    times: Vec<PhaseTime>,
}

impl Clock {
    fn end(&mut self, phase: Phase) {
        let now = Instant::now();
        self.times.push(PhaseTime { phase, duration: now - self.phase_begin });
        self.phase_begin = now;
    }
}
