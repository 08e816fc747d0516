//! What can be asked of the driver, and the handle that asks it.
//!
//! Every request carries where its answer goes. A caller that goes away does not call its request off: the
//! driver carries it out all the same.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tonic::Streaming;
use vmctr_proto::agent::{StatsReply, UpperChunk};
use vmctr_proto::control::InspectReply;

use super::create::CreateRequest;
use super::process::{Exit, Phase};
use crate::error::{Result, TaskError};
use crate::stdio::{Names, Outputs};

/// Requests that may wait for the driver.
pub const QUEUE: usize = 64;

/// Where an answer goes.
pub type Answer<T> = oneshot::Sender<Result<T>>;

/// One request.
#[derive(Debug)]
pub enum Request {
    /// Starts the VM and prepares the container; its process ID.
    Create(Box<CreateRequest>, Answer<u32>),
    /// Something for the container. Without one, its answer is dropped.
    Container(ContainerRequest),
    /// Forgets a process, named by its exec ID; the init process (empty) takes the VM with it.
    Delete(String, Answer<Deleted>),
    /// The container's process ID on the host, 0 without a container.
    Connect(Answer<u32>),
    /// Everything there is to know.
    Inspect(Answer<InspectReply>),
    /// Ends the driver unless there is a container.
    Shutdown(Answer<()>),
    /// Ends the driver, and the container with it.
    Terminate,
}

/// A request to a container that exists. An empty exec ID means its init process.
#[derive(Debug)]
pub enum ContainerRequest {
    /// Registers a further process.
    Exec(ExecRequest, Answer<()>),
    /// Runs a process.
    Start(String, Answer<u32>),
    /// What the output of a process that is to start still waits for.
    Opening(String, Answer<Option<Outputs>>),
    /// What the output of a deletable process still waits for.
    Outputs(String, Answer<Option<Outputs>>),
    /// A process's state.
    State(String, Answer<StateReply>),
    /// For waiting for a process's end.
    Wait(String, Answer<watch::Receiver<Option<Exit>>>),
    /// Sends a signal, to all processes of the container when `all` is set.
    Kill {
        /// Whose.
        exec_id: String,
        /// Number.
        signal: u32,
        /// Every process instead.
        all: bool,
        /// Done.
        answer: Answer<()>,
    },
    /// Changes a terminal's size.
    Resize {
        /// Whose.
        exec_id: String,
        /// Columns and rows.
        size: (u32, u32),
        /// Done.
        answer: Answer<()>,
    },
    /// Ends a process's input.
    CloseStdin(String, Answer<()>),
    /// Freezes the container.
    Pause(Answer<()>),
    /// Thaws it.
    Resume(Answer<()>),
    /// Freezes it, when told so, and writes its changes back, until released.
    Hold(bool, Answer<u64>),
    /// Ends the hold of this number; tells how long it froze the container.
    Release(u64, Answer<Duration>),
    /// Begins to read the upper folder that it keeps in the guest.
    ReadUpper(Answer<Streaming<UpperChunk>>),
    /// Begins to read its root as its processes see it.
    ReadMerged(Answer<Streaming<UpperChunk>>),
    /// Has its root served to streams from the host, under the number that is answered.
    Export(Answer<u32>),
    /// Its processes in the guest.
    Pids(Answer<Vec<Pid>>),
    /// Its cgroup's figures.
    Stats(Answer<StatsReply>),
    /// Changes its limits; `linux.resources` as JSON.
    Update(Vec<u8>, Answer<()>),
}

/// A further process to run.
#[derive(Debug)]
pub struct ExecRequest {
    /// Its ID within the container.
    pub exec_id: String,
    /// OCI `process` object as JSON.
    pub spec: Vec<u8>,
    /// Its streams.
    pub names: Names,
}

/// A process's state.
#[derive(Debug)]
pub struct StateReply {
    /// Process ID on the host; 0 for an exec that was not started.
    pub pid: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its streams.
    pub names: Names,
    /// Directory of the container's bundle.
    pub bundle: PathBuf,
}

/// A process that is gone.
#[derive(Clone, Copy, Debug)]
pub struct Deleted {
    /// Process ID that it had.
    pub pid: u32,
    /// Its end.
    pub exit: Exit,
}

/// A process in the guest.
#[derive(Debug)]
pub struct Pid {
    /// In the guest's numbering.
    pub pid: u32,
    /// Set for an exec's own process.
    pub exec_id: String,
}

/// Sends requests; clones reach the same driver.
#[derive(Clone, Debug)]
pub struct Handle(mpsc::Sender<Request>);

impl Handle {
    /// A handle and the queue that the driver serves.
    pub fn new() -> (Self, mpsc::Receiver<Request>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self(sender), queue)
    }

    /// Asks the container and waits for the answer.
    pub async fn ask_container<T>(&self, make: impl FnOnce(Answer<T>) -> ContainerRequest) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        // Without a driver there is no container either.
        let _ = self.0.send(Request::Container(make(answer))).await;
        answered.await.map_err(|_| no_container())?
    }

    /// Asks the driver and waits for the answer.
    pub async fn ask<T>(&self, make: impl FnOnce(Answer<T>) -> Request) -> Result<T> {
        let gone = || TaskError::Unavailable("the shim is shutting down".into());
        let (answer, answered) = oneshot::channel();
        self.0.send(make(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Ends the driver, and the container with it.
    pub async fn terminate(&self) {
        // A driver that has ended already needs no telling.
        let _ = self.0.send(Request::Terminate).await;
    }
}

/// There is nothing to ask.
pub fn no_container() -> TaskError {
    TaskError::NotFound("the container does not exist".into())
}
