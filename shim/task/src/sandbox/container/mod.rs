//! A container that was created: its processes, and its VM while that lives.
//!
//! ```text
//!   verbs   what containerd asks of a live container: exec, start, kill, pause, ...
//!   hold    standing still while its changes are read
//!   ends    exits, the VM's end, deletion
//! ```
//!
//! Invariants: a process's exit is published once, after its start; after the VM's end no process is live.

mod ends;
mod hold;
mod verbs;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use oci_spec::runtime::Hooks;
use tokio::sync::watch;
use tokio::time::Instant;
use vmctr_proto::agent::{ContainerRef, ProcessRef};

use super::driver::Identity;
use super::process::{Exit, Phase};
use super::request::{Deleted, StateReply, no_container};
use super::session::Session;
use super::steps::Steps;
use super::task::Task;
use crate::error::{Result, TaskError};
use crate::hooks::State;
use hold::Held;

/// Preparing a container, an exec, or running them: under TCG a second or two.
pub const CREATE_LIMIT: Duration = Duration::from_secs(60);

const CALL_LIMIT: Duration = Duration::from_secs(10);

const SIGKILL: u32 = 9;

/// The container.
#[derive(Debug)]
pub struct Container {
    identity: Identity,
    session: Option<Session>,
    pid: u32,
    tasks: BTreeMap<String, Task>,
    hooks: Hooks,
    state: State,
    /// Of its start.
    steps: Steps,
    kill_deadline: Option<Instant>,
    last_oom: Option<Instant>,
    held: Option<Held>,
    /// Holds so far: the number of the last one.
    holds: u64,
}

impl Container {
    /// A container without processes.
    pub fn new(identity: &Identity, session: Session, hooks: Hooks, state: State) -> Self {
        Self {
            identity: identity.clone(),
            pid: session.pid(),
            steps: session.steps().clone(),
            session: Some(session),
            tasks: BTreeMap::new(),
            hooks,
            state,
            kill_deadline: None,
            last_oom: None,
            held: None,
            holds: 0,
        }
    }

    /// Adds a process.
    pub fn insert(&mut self, exec_id: String, task: Task) {
        self.tasks.insert(exec_id, task);
    }

    /// Its ID.
    pub fn id(&self) -> &str {
        &self.identity.container_id
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.identity.namespace
    }

    /// Its process ID on the host: QEMU's.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Programs of the spec.
    pub fn hooks(&self) -> &Hooks {
        &self.hooks
    }

    /// What hooks are told.
    pub fn hook_state(&self, status: &'static str) -> State {
        let pid = (status != "stopped").then_some(self.pid);
        State { status, pid, ..self.state.clone() }
    }

    /// Its processes by exec ID; the init process's is empty.
    pub fn tasks(&self) -> &BTreeMap<String, Task> {
        &self.tasks
    }

    /// The VM, while it lives.
    pub fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// The VM, for those who cannot do without.
    pub fn session_mut(&mut self) -> Result<&mut Session> {
        self.session.as_mut().ok_or_else(vm_gone)
    }

    /// The parts of its start, in order.
    pub fn steps(&self) -> &Steps {
        &self.steps
    }

    /// It is prepared, which was the last part's doing.
    pub fn prepared(&mut self) {
        self.steps.end("create");
    }

    /// When a SIGKILL that was sent must have shown effect.
    pub fn kill_deadline(&self) -> Option<Instant> {
        self.kill_deadline
    }

    /// A process's state.
    pub fn state(&self, exec_id: &str) -> Result<StateReply> {
        let task = self.task(exec_id)?;
        let pid = if task.in_guest { self.pid } else { 0 };
        let (phase, names, bundle) = (task.process.phase(), task.names.clone(), self.state.bundle.clone());
        Ok(StateReply { pid, phase, names, bundle })
    }

    /// For waiting for a process's end.
    pub fn wait(&self, exec_id: &str) -> Result<watch::Receiver<Option<Exit>>> {
        Ok(self.task(exec_id)?.process.exit())
    }

    /// Whether the container's init process can still end.
    pub fn is_live(&self) -> bool {
        self.init().is_ok_and(|init| init.process.is_live())
    }

    fn live_session(&self) -> Result<&Session> {
        self.session.as_ref().ok_or_else(vm_gone)
    }

    fn task(&self, exec_id: &str) -> Result<&Task> {
        self.tasks.get(exec_id).ok_or_else(|| no_process(exec_id))
    }

    fn task_mut(&mut self, exec_id: &str) -> Result<&mut Task> {
        self.tasks.get_mut(exec_id).ok_or_else(|| no_process(exec_id))
    }

    fn init(&self) -> Result<&Task> {
        self.task("")
    }

    fn process_ref(&self, exec_id: &str) -> ProcessRef {
        ProcessRef { container_id: self.id().to_owned(), exec_id: exec_id.to_owned() }
    }

    fn container_ref(&self) -> ContainerRef {
        ContainerRef { container_id: self.id().to_owned() }
    }
}

fn deleted(task: &Task, pid: u32) -> Deleted {
    let exit = match task.process.phase() {
        Phase::Stopped(exit) => exit,
        _ => Exit { status: 0, at: SystemTime::now() },
    };
    Deleted { pid: if task.in_guest { pid } else { 0 }, exit }
}

fn vm_gone() -> TaskError {
    TaskError::FailedPrecondition("the container's VM has ended".into())
}

fn no_process(exec_id: &str) -> TaskError {
    if exec_id.is_empty() {
        no_container()
    } else {
        TaskError::NotFound(format!("exec {exec_id} does not exist"))
    }
}
