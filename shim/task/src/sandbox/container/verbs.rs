//! What containerd asks of a live container.

use std::time::Duration;

use containerd_shim::protos::events::task::{
    TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tracing::{info, warn};
use vmctr_proto::agent::{CreateExecRequest, ResizePtyRequest, SignalRequest, StatsReply, UpdateRequest};

use super::{CALL_LIMIT, CREATE_LIMIT, Container, SIGKILL};
use crate::error::{Result, TaskError, chain};
use crate::hooks::{self, Moment};
use crate::oci;
use crate::sandbox::agent::CallError;
use crate::sandbox::request::{ExecRequest, Pid};
use crate::sandbox::task::{Task, check_exec_id};
use crate::stdio::{self, ProcessIo};

/// From SIGKILL to the exit: a guest that takes longer is killed with its container.
const KILL_LIMIT: Duration = Duration::from_secs(10);

const SIGNAL_MAX: u32 = 64;

impl Container {
    /// Registers an exec.
    pub fn exec(&mut self, request: ExecRequest) -> Result<()> {
        check_exec_id(&request.exec_id)?;
        self.init()?.process.check_running()?;
        oci::check_exec(&request.spec).map_err(|error| TaskError::invalid(&error))?;
        let exec_id = request.exec_id.clone();
        if self.tasks.contains_key(&exec_id) {
            return Err(TaskError::AlreadyExists(format!("exec {exec_id} exists already")));
        }
        self.insert(exec_id.clone(), Task::exec(request));
        let container_id = self.id().to_owned();
        self.identity.publisher.publish(TaskExecAdded { container_id, exec_id, ..TaskExecAdded::default() });
        Ok(())
    }

    /// Runs a process.
    pub async fn start(&mut self, exec_id: &str) -> Result<u32> {
        self.check_not_held()?;
        self.task(exec_id)?.process.check_start()?;
        if !exec_id.is_empty() {
            self.init()?.process.check_running()?;
            self.prepare_exec(exec_id).await?;
        }
        let process = self.process_ref(exec_id);
        self.steps.skip();
        let session = self.live_session()?;
        let started = session
            .agent()
            .call("start the process", CREATE_LIMIT, |mut agent| async move { agent.start(process).await })
            .await;
        let guest_pid = match started {
            Ok(reply) => reply.pid,
            Err(error) => return Err(self.start_failed(exec_id, error).await),
        };
        if exec_id.is_empty() {
            self.steps.end("start");
            info!(steps = %self.steps, "Container started");
        }
        let task = self.task_mut(exec_id)?;
        task.guest_pid = guest_pid;
        task.process.started();
        let size = task.size;
        let input = task.io.as_mut().map_or(Ok(()), ProcessIo::open_stdin);
        if let Err(error) = input {
            warn!(exec_id, "{}", chain(&error));
        }
        self.publish_start(exec_id);
        if exec_id.is_empty() {
            hooks::run_all(&self.hooks, Moment::PostStart, &self.hook_state("running")).await;
        }
        // The process runs, which containerd has heard: a terminal of the wrong size does not undo that.
        if let Some(size) = size
            && let Err(error) = self.resize(exec_id, size).await
        {
            warn!(exec_id, "{}", chain(&error));
        }
        Ok(self.pid)
    }

    async fn prepare_exec(&mut self, exec_id: &str) -> Result<()> {
        let task = self.task(exec_id)?;
        let (names, spec) = (task.names.clone(), task.exec_spec.clone().unwrap_or_default());
        let (identity, opening) = (self.identity.clone(), names.clone());
        let opened =
            spawn_blocking(move || stdio::open(&opening, &identity.container_id, &identity.namespace));
        let endpoints = opened
            .await
            .map_err(|error| TaskError::internal("Cannot open the exec's streams", &error))?
            .map_err(|error| TaskError::invalid(&error))?;
        let process = Some(self.process_ref(exec_id));
        let session = self.session_mut()?;
        let (stdio, streams) = session
            .open_streams(endpoints.wanted(), names.terminal)
            .await
            .map_err(|error| TaskError::internal("Cannot open the exec's streams", &error))?;
        let request = CreateExecRequest { process, spec, stdio: Some(stdio) };
        session
            .agent()
            .call(
                "prepare the exec",
                CREATE_LIMIT,
                |mut agent| async move { agent.create_exec(request).await },
            )
            .await?;
        let io = endpoints.start(streams).map_err(|error| TaskError::internal("Cannot start", &error))?;
        let task = self.task_mut(exec_id)?;
        task.io = Some(io);
        task.in_guest = true;
        Ok(())
    }

    /// An exec can be started anew. An init process that cannot run ends, which the guest reports.
    async fn start_failed(&mut self, exec_id: &str, error: CallError) -> TaskError {
        if !exec_id.is_empty() {
            self.forget_in_guest(exec_id).await;
            if let Ok(task) = self.task_mut(exec_id) {
                task.io = None;
                task.in_guest = false;
            }
        }
        error.into()
    }

    fn publish_start(&self, exec_id: &str) {
        let (container_id, pid) = (self.id().to_owned(), self.pid);
        let publisher = &self.identity.publisher;
        if exec_id.is_empty() {
            publisher.publish(TaskStart { container_id, pid, ..TaskStart::default() });
        } else {
            let exec_id = exec_id.to_owned();
            publisher.publish(TaskExecStarted { container_id, exec_id, pid, ..TaskExecStarted::default() });
        }
    }

    /// Sends a signal.
    pub async fn kill(&mut self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        if signal > SIGNAL_MAX {
            return Err(TaskError::InvalidArgument(format!("{signal} is not a signal number")));
        }
        let task = self.task(exec_id)?;
        task.process.check_signal()?;
        if !task.in_guest {
            return Err(TaskError::FailedPrecondition(format!("exec {exec_id} was not started")));
        }
        let request = SignalRequest { process: Some(self.process_ref(exec_id)), signal, all };
        let sent = self
            .live_session()?
            .agent()
            .call("take the signal", CALL_LIMIT, |mut agent| async move { agent.signal(request).await })
            .await;
        let fatal = signal == SIGKILL && exec_id.is_empty();
        match sent {
            Ok(_) if fatal => {
                self.kill_deadline.get_or_insert_with(|| Instant::now() + KILL_LIMIT);
                Ok(())
            }
            // A guest that does not take a SIGKILL gets one itself.
            Err(error @ CallError::Timeout { .. }) if fatal => {
                self.vm_ended(&error.to_string()).await;
                Ok(())
            }
            // The end of the VM was death enough; its event follows.
            Err(CallError::Ended(_)) if fatal => Ok(()),
            sent => Ok(sent.map(drop)?),
        }
    }

    /// Changes a terminal's size, at once or at the start.
    pub async fn resize(&mut self, exec_id: &str, (width, height): (u32, u32)) -> Result<()> {
        let task = self.task_mut(exec_id)?;
        if !task.in_guest {
            task.size = Some((width, height));
            return Ok(());
        }
        task.process.check_signal()?;
        let request = ResizePtyRequest { process: Some(self.process_ref(exec_id)), width, height };
        self.live_session()?
            .agent()
            .call(
                "resize the terminal",
                CALL_LIMIT,
                |mut agent| async move { agent.resize_pty(request).await },
            )
            .await?;
        Ok(())
    }

    /// Ends a process's input.
    pub fn close_stdin(&mut self, exec_id: &str) -> Result<()> {
        if let Some(io) = &mut self.task_mut(exec_id)?.io {
            io.close_stdin();
        }
        Ok(())
    }

    /// Freezes the container.
    pub async fn pause(&mut self) -> Result<()> {
        self.check_not_held()?;
        self.init()?.process.check_running()?;
        self.freeze_in_guest().await?;
        self.tasks.values_mut().for_each(|task| task.process.paused());
        let container_id = self.id().to_owned();
        self.identity.publisher.publish(TaskPaused { container_id, ..TaskPaused::default() });
        Ok(())
    }

    /// Thaws it.
    pub async fn resume(&mut self) -> Result<()> {
        self.check_not_held()?;
        self.init()?.process.check_paused()?;
        self.thaw_in_guest().await?;
        self.tasks.values_mut().for_each(|task| task.process.resumed());
        let container_id = self.id().to_owned();
        self.identity.publisher.publish(TaskResumed { container_id, ..TaskResumed::default() });
        Ok(())
    }

    /// Its processes in the guest.
    pub async fn pids(&self) -> Result<Vec<Pid>> {
        self.check_init_live()?;
        let container = self.container_ref();
        let reply = self
            .live_session()?
            .agent()
            .call("list the processes", CALL_LIMIT, |mut agent| async move { agent.pids(container).await })
            .await?;
        Ok(reply
            .processes
            .into_iter()
            .map(|process| Pid { pid: process.pid, exec_id: process.exec_id })
            .collect())
    }

    /// Its cgroup's figures.
    pub async fn stats(&self) -> Result<StatsReply> {
        self.check_init_live()?;
        let container = self.container_ref();
        let stats = self
            .live_session()?
            .agent()
            .call("count", CALL_LIMIT, |mut agent| async move { agent.stats(container).await })
            .await?;
        Ok(stats)
    }

    /// Changes its limits.
    pub async fn update(&self, resources: Vec<u8>) -> Result<()> {
        self.check_init_live()?;
        let session = self.live_session()?;
        oci::check_update(&resources, session.vm().spec().memory().bytes())
            .map_err(|error| TaskError::invalid(&error))?;
        let request = UpdateRequest { container_id: self.id().to_owned(), resources };
        session
            .agent()
            .call("change the limits", CALL_LIMIT, |mut agent| async move { agent.update(request).await })
            .await?;
        Ok(())
    }

    /// Has its root served to streams from the host; the number that they name.
    pub async fn export(&self) -> Result<u32> {
        self.check_init_live()?;
        let container = self.container_ref();
        let export = |mut agent: vmctr_vmm::vm::Agent| async move { agent.export_container(container).await };
        let reply = self.live_session()?.agent().call("serve its root", CALL_LIMIT, export).await?;
        Ok(reply.export)
    }

    fn check_init_live(&self) -> Result<()> {
        self.init()?.process.check_signal()
    }
}
