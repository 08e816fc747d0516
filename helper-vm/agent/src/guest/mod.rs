//! The actor: one task owns all containers, processes and events. Everyone else sends it a closure to
//! run and waits for the answer; nothing in it waits.
//!
//! ```text
//!   verbs ──closure──> queue ──> Guest { containers, streams, events, reaper }
//!   SIGCHLD ─────────────┘         │
//!   memory.events ───────┘         └── spawns helpers, reaps everything, appends events
//! ```

mod container;
mod events;
mod helper;
mod lifecycle;
mod oom;
mod reaper;

use std::collections::HashMap;
use std::sync::Arc;

use rustix::process::Pid;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use vmctr_proto::agent::{ExitEvent, OomEvent, ProcessRef, event};

use crate::cgroup::DeviceProgram;
use crate::ids::{ContainerId, ProcessId};
use crate::network::Network;
use crate::stdio::Streams;

pub use container::{Container, Exec};
pub use events::EventLog;
pub use helper::{Helper, HelperError, Names, Verb};
pub use lifecycle::{State, WrongState};
pub use reaper::Reaper;

/// Requests that may wait for the actor; callers wait beyond that.
const QUEUE: usize = 256;

/// A container or process is not there, or there already.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("{0} does not exist")]
    Missing(ProcessId),
    #[error("{0} exists already")]
    Exists(ProcessId),
}

type Job = Box<dyn FnOnce(&mut Guest) + Send>;

/// The way to the actor.
#[derive(Clone)]
pub struct Handle(mpsc::Sender<Job>);

impl Handle {
    /// Runs a closure on the guest's state and returns its result.
    pub async fn call<T: Send + 'static>(&self, job: impl FnOnce(&mut Guest) -> T + Send + 'static) -> T {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move |guest| drop(sender.send(job(guest))));
        if self.0.send(job).await.is_err() {
            return std::future::pending().await;
        }
        match receiver.await {
            Ok(result) => result,
            // The actor lives as long as PID 1; it is gone only while PID 1 ends.
            Err(_) => std::future::pending().await,
        }
    }
}

/// All state of the guest.
pub struct Guest {
    /// Containers by their name on the host.
    pub containers: HashMap<ContainerId, Container>,
    /// Streams that wait for a process, and the other way round.
    pub streams: Streams,
    /// What the host has to learn.
    pub events: EventLog,
    /// Exits that belong to nobody yet.
    pub reaper: Reaper,
    /// The share's tag, once it is mounted or being mounted.
    pub share: Option<String>,
    /// For the next container that wants one of its own.
    pub network: Option<Network>,
    /// Of the last container. The next one rarely has another.
    pub devices: Option<Arc<DeviceProgram>>,
    /// Containers ever created: names directories and groups.
    created: u64,
    oom: oom::Watch,
}

/// Starts the actor and what feeds it. The task ends only by a defect of the agent.
pub fn start() -> std::io::Result<(Handle, JoinHandle<()>)> {
    let (sender, mut queue) = mpsc::channel::<Job>(QUEUE);
    let handle = Handle(sender);
    reaper::watch(handle.clone())?;
    let mut guest = Guest::new(oom::Watch::start(handle.clone())?);
    let actor = tokio::spawn(async move {
        while let Some(job) = queue.recv().await {
            job(&mut guest);
        }
    });
    Ok((handle, actor))
}

impl Guest {
    fn new(oom: oom::Watch) -> Self {
        Self {
            containers: HashMap::new(),
            streams: Streams::default(),
            events: EventLog::default(),
            reaper: Reaper::default(),
            share: None,
            network: None,
            devices: None,
            created: 0,
            oom,
        }
    }

    /// A short name that no container had before.
    pub fn new_name(&mut self) -> String {
        let name = self.next_name();
        self.created += 1;
        name
    }

    /// The name that the next container will have.
    pub fn next_name(&self) -> String {
        format!("c{}", self.created + 1)
    }

    /// The container.
    pub fn container(&mut self, id: &ContainerId) -> Result<&mut Container, LookupError> {
        self.containers.get_mut(id).ok_or_else(|| LookupError::Missing(ProcessId::init(id)))
    }

    /// The state of a process.
    pub fn state(&mut self, id: &ProcessId) -> Result<&mut State, LookupError> {
        let container = self.container(&id.container)?;
        container.state(id.exec.as_deref()).ok_or_else(|| LookupError::Missing(id.clone()))
    }

    /// A helper announced this process; from now on its end is reported, also when it has ended already.
    pub fn adopt(
        &mut self,
        id: &ProcessId,
        pid: Pid,
        advance: impl FnOnce(&mut State) -> Result<(), WrongState>,
    ) -> Result<(), AdoptError> {
        advance(self.state(id)?)?;
        if let Some(status) = self.reaper.claim(pid) {
            self.exited(pid, status);
        }
        Ok(())
    }

    /// A child of PID 1 ended.
    pub fn exited(&mut self, pid: Pid, status: u32) {
        let owner = self.containers.iter().find_map(|(id, container)| {
            container.owner(pid).map(|exec| ProcessId { container: id.clone(), exec })
        });
        let Some(id) = owner else {
            self.reaper.unclaimed(pid, status);
            return;
        };
        // What killed it is told first.
        self.report_oom(&id.container);
        if self.state(&id).is_ok_and(|state| state.exited(status)) {
            let process =
                ProcessRef { container_id: id.container.to_string(), exec_id: id.exec_name().to_owned() };
            self.events.push(event::Kind::Exit(ExitEvent { process: Some(process), status }));
        }
        if let Ok(container) = self.container(&id.container) {
            container.exited.notify_waiters();
        }
    }

    /// OOM kills of this container are reported from now on.
    pub fn watch_oom(&mut self, id: &ContainerId) -> Result<(), WatchError> {
        let events = self.container(id)?.cgroup.memory_events();
        Ok(self.oom.add(&events)?)
    }

    /// Reports OOM kills of every container that are news.
    pub fn report_ooms(&mut self) {
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        ids.iter().for_each(|id| self.report_oom(id));
    }

    fn report_oom(&mut self, id: &ContainerId) {
        if self.containers.get_mut(id).is_some_and(Container::oom_is_news) {
            self.events.push(event::Kind::Oom(OomEvent { container_id: id.to_string() }));
        }
    }
}

/// A process that a helper announced cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error(transparent)]
    State(#[from] WrongState),
}

/// A container's OOM kills cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error("watching memory.events")]
    Io(#[from] std::io::Error),
}
