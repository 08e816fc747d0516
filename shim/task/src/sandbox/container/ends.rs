//! Exits, the VM's end, deletion.

use std::time::{Duration, SystemTime};

use containerd_shim::protos::events::task::{TaskDelete, TaskExit, TaskOOM};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::{CALL_LIMIT, Container, SIGKILL, deleted, no_process};
use crate::error::Result;
use crate::events::timestamp;
use crate::hooks::{self, Moment};
use crate::sandbox::guest_events::GuestEvent;
use crate::sandbox::process::{Exit, Phase};
use crate::sandbox::request::Deleted;
use crate::sandbox::steps::Steps;
use crate::stdio::{self, ProcessIo};

/// Killing what is left of a container and unmounting its root.
const DELETE_LIMIT: Duration = Duration::from_secs(30);

/// At most one OOM event in this time: each is the guest's to make.
const OOM_INTERVAL: Duration = Duration::from_secs(1);

/// Exit status of a process whose VM ended: as if killed.
const STATUS_KILLED: u32 = 128 + SIGKILL;

impl Container {
    /// Something happened in the guest.
    pub fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Exit { exec_id, status } => match self.task(&exec_id) {
                Ok(task) if task.in_guest => self.exited(&exec_id, status),
                _ => debug!(exec_id, "The guest reports the end of an unknown process"),
            },
            GuestEvent::Oom => self.oom(),
        }
    }

    fn oom(&mut self) {
        if self.last_oom.is_none_or(|last| last.elapsed() >= OOM_INTERVAL) {
            self.last_oom = Some(Instant::now());
            warn!("The container ran out of memory");
            let container_id = self.id().to_owned();
            self.identity.publisher.publish(TaskOOM { container_id, ..TaskOOM::default() });
        }
    }

    /// Records an end and tells containerd, the first time.
    fn exited(&mut self, exec_id: &str, status: u32) {
        let exit = Exit { status, at: SystemTime::now() };
        let Ok(task) = self.task_mut(exec_id) else { return };
        let unknown = !exec_id.is_empty() && task.process.phase() == Phase::Created;
        // containerd has not heard of an exec that was never started.
        if !task.process.exited(exit) || unknown {
            return;
        }
        info!(exec_id, status, "Process ended");
        if exec_id.is_empty() {
            self.kill_deadline = None;
        }
        let container_id = self.id().to_owned();
        let id = if exec_id.is_empty() { container_id.clone() } else { exec_id.to_owned() };
        self.identity.publisher.publish(TaskExit {
            container_id,
            id,
            pid: self.pid,
            exit_status: status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..TaskExit::default()
        });
    }

    /// The VM is over, or is to be: whoever lived in it has been killed.
    pub async fn vm_ended(&mut self, reason: &str) {
        error!("The VM has ended: {reason}");
        self.stop_session(&mut Steps::begin()).await;
    }

    /// Ends the VM. Nobody outlives it.
    async fn stop_session(&mut self, steps: &mut Steps) {
        if let Some(session) = self.session.take() {
            session.stop(steps).await;
        }
        self.kill_deadline = None;
        let mut live: Vec<_> =
            self.tasks.iter().filter(|(_, task)| task.process.is_live()).map(|(id, _)| id.clone()).collect();
        // Execs first: containerd takes the init process's end for the container's.
        live.reverse();
        live.iter().for_each(|exec_id| self.exited(exec_id, STATUS_KILLED));
    }

    /// What the output of a process that may not run yet still waits for.
    pub fn opening(&self, exec_id: &str) -> Result<Option<stdio::Outputs>> {
        Ok(self.task(exec_id)?.io.as_ref().map(ProcessIo::outputs))
    }

    /// What the output of a process that can be deleted still waits for.
    pub fn outputs(&self, exec_id: &str) -> Result<Option<stdio::Outputs>> {
        let task = self.task(exec_id)?;
        task.process.check_delete()?;
        Ok(task.io.as_ref().map(ProcessIo::outputs))
    }

    /// Forgets an exec.
    pub async fn delete_exec(&mut self, exec_id: &str) -> Result<Deleted> {
        self.task(exec_id)?.process.check_delete()?;
        self.forget_in_guest(exec_id).await;
        let task = self.tasks.remove(exec_id).ok_or_else(|| no_process(exec_id))?;
        Ok(deleted(&task, self.pid))
    }

    pub(super) async fn forget_in_guest(&self, exec_id: &str) {
        let Some(session) = &self.session else { return };
        let process = self.process_ref(exec_id);
        let forgotten = session
            .agent()
            .call("forget the exec", CALL_LIMIT, |mut agent| async move { agent.delete(process).await })
            .await;
        if let Err(error) = forgotten {
            debug!(exec_id, "{error}");
        }
    }

    /// Fails unless the container can be deleted.
    pub fn check_delete(&self) -> Result<()> {
        self.init()?.process.check_delete()
    }

    /// Ends everything in the reverse order of its making and tells containerd.
    pub async fn delete(mut self) -> Result<Deleted> {
        let mut steps = Steps::begin();
        // Nobody writes any more, and the VM ends as by a power cut: unmounting first would change nothing.
        self.write_back().await;
        steps.end("flush");
        self.stop_session(&mut steps).await;
        info!(%steps, "Container deleted");
        hooks::run_all(&self.hooks, Moment::PostStop, &self.hook_state("stopped")).await;
        let deleted = deleted(self.init()?, self.pid);
        self.identity.publisher.publish(TaskDelete {
            container_id: self.id().to_owned(),
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: Some(timestamp(deleted.exit.at)).into(),
            ..TaskDelete::default()
        });
        Ok(deleted)
    }

    /// Whoever still runs is ended before the VM goes, so that what it wrote is on the host.
    async fn close_guest(&self) {
        let Some(session) = &self.session else { return };
        let process = self.process_ref("");
        let deleted = session
            .agent()
            .call(
                "delete the container",
                DELETE_LIMIT,
                |mut agent| async move { agent.delete(process).await },
            )
            .await;
        if let Err(error) = deleted {
            warn!("{error}");
        }
        self.write_back().await;
    }

    /// What was written last is on the host before the VM goes.
    async fn write_back(&self) {
        if let Err(error) = self.flush().await {
            error!("Changes may be lost: {error}");
        }
    }

    /// A create that failed: nothing of it stays, containerd has not heard of it.
    pub async fn abandon(mut self) {
        if let Some(session) = self.session.take() {
            session.stop(&mut Steps::begin()).await;
        }
        hooks::run_all(&self.hooks, Moment::PostStop, &self.hook_state("stopped")).await;
    }

    /// The shim is told to end: the VM goes; containerd reports the container's end itself when the shim is gone.
    pub async fn terminate(mut self) {
        let mut steps = Steps::begin();
        self.close_guest().await;
        steps.end("close");
        if let Some(session) = self.session.take() {
            session.stop(&mut steps).await;
        }
    }
}
