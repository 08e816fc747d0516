//! The task that owns the container. It does one thing at a time: a request, an event of the guest, the VM's
//! end. Each has a time limit, so the next one's turn comes.
//!
//! Creating and deleting take seconds. Meanwhile there is no container, and whoever asks for it is told so at
//! once: containerd waits but two seconds for a state, and lists no container while it waits.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim::protos::events::task::{TaskCreate, TaskIO};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{Instrument, error, info};
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::Owner;

use super::container::Container;
use super::create::{CreateRequest, create};
use super::guest_events::GuestEvent;
use super::inspect::{self, inspect};
use super::request::{ContainerRequest, Deleted, Handle, QUEUE, Request, no_container};
use super::warm::Warm;
use crate::control;
use crate::error::{Result, TaskError};
use crate::events::Publisher;

/// The exit of an init process that could not run arrives within this time.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);

/// Whose shim this is, and what it works with.
#[derive(Clone, Debug)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// The one container of this shim.
    pub container_id: String,
    /// Configuration.
    pub config: Arc<Config>,
    /// Where events go.
    pub publisher: Publisher,
}

impl Identity {
    /// The owner of the container's VM.
    pub fn owner(&self, bundle: PathBuf) -> Owner {
        Owner { namespace: self.namespace.clone(), container_id: self.container_id.clone(), bundle }
    }
}

/// Starts the driver. It ends after a shutdown request, or when it is told to terminate.
/// Its container's VM may be one that waits already.
pub fn spawn(identity: Identity, warm: Option<Warm>) -> (Handle, JoinHandle<()>) {
    let (handle, requests) = Handle::new();
    let driver =
        Driver { identity, handle: handle.clone(), requests, postponed: VecDeque::new(), warm, live: None };
    (handle, tokio::spawn(driver.run().in_current_span()))
}

struct Driver {
    identity: Identity,
    /// For the control service.
    handle: Handle,
    requests: mpsc::Receiver<Request>,
    /// Came while there was no container yet or no more, and can wait.
    postponed: VecDeque<Request>,
    warm: Option<Warm>,
    live: Option<Live>,
}

/// A container and what comes from it.
struct Live {
    container: Container,
    events: mpsc::Receiver<GuestEvent>,
    _control: Option<control::Server>,
}

/// What happened next.
enum Step {
    Request(Request),
    Guest(GuestEvent),
    VmEnded(String),
    KillOverdue,
    End,
}

impl Driver {
    async fn run(mut self) {
        loop {
            match self.next().await {
                Step::Request(Request::Shutdown(answer)) => {
                    let idle = self.live.is_none();
                    let _ = answer.send(Ok(()));
                    if idle {
                        return;
                    }
                }
                Step::Request(Request::Terminate) | Step::End => break,
                Step::Request(request) => self.request(request).await,
                step => {
                    if let Some(live) = &mut self.live {
                        live.step(step).await;
                    }
                }
            }
        }
        if let Some(warm) = self.warm.take() {
            warm.discard().await;
        }
        if let Some(live) = self.live.take() {
            info!("Told to end: ending the container");
            live.container.terminate().await;
        }
    }

    /// Fair: a guest that floods the host with events does not keep containerd from being heard.
    async fn next(&mut self) -> Step {
        if let Some(request) = self.postponed.pop_front() {
            return Step::Request(request);
        }
        let Some(live) = &mut self.live else {
            return self.requests.recv().await.map_or(Step::End, Step::Request);
        };
        let ended = live.container.session().map(super::session::Session::ended);
        tokio::select! {
            Some(event) = live.events.recv() => Step::Guest(event),
            reason = or_never(ended) => Step::VmEnded(reason),
            () = or_never(live.container.kill_deadline().map(sleep_until)) => Step::KillOverdue,
            request = self.requests.recv() => request.map_or(Step::End, Step::Request),
        }
    }

    async fn request(&mut self, request: Request) {
        // An answer that nobody waits for is no error: the caller has gone away.
        match request {
            Request::Create(request, answer) => drop(answer.send(self.create(*request).await)),
            Request::Delete(exec_id, answer) => drop(answer.send(self.delete(&exec_id).await)),
            Request::Connect(answer) => {
                drop(answer.send(Ok(self.live.as_ref().map_or(0, |live| live.container.pid()))));
            }
            Request::Inspect(answer) => {
                let reply = self.live.as_ref().map(|live| inspect::facts(&live.container));
                // Reading what processes use takes long enough to be done elsewhere.
                tokio::spawn(async move { answer.send(inspect(reply).await) });
            }
            Request::Container(request) => {
                if let Some(live) = &mut self.live {
                    live.request(request).await;
                }
            }
            // The loop's own.
            Request::Shutdown(_) | Request::Terminate => {}
        }
    }

    async fn create(&mut self, request: CreateRequest) -> Result<u32> {
        if self.live.is_some() {
            return Err(TaskError::AlreadyExists(format!(
                "container {} exists already",
                self.identity.container_id
            )));
        }
        let told = task_create(&self.identity, &request);
        let (identity, warm) = (self.identity.clone(), self.warm.take());
        let created = self.without_container(create(&identity, request, warm)).await;
        let (container, events) = created.inspect_err(|error| {
            error!("Cannot create the container: {error}");
        })?;
        let pid = container.pid();
        let socket = container.session().map(|session| session.run_dir().control_socket());
        let control = socket.and_then(|socket| control::serve(&socket, self.handle.clone()));
        self.identity.publisher.publish(TaskCreate { pid, ..told });
        self.live = Some(Live { container, events, _control: control });
        Ok(pid)
    }

    async fn delete(&mut self, exec_id: &str) -> Result<Deleted> {
        let Some(mut live) = self.live.take() else { return Err(no_container()) };
        if !exec_id.is_empty() {
            let deleted = live.container.delete_exec(exec_id).await;
            self.live = Some(live);
            return deleted;
        }
        if let Err(error) = live.container.check_delete() {
            self.live = Some(live);
            return Err(error);
        }
        self.without_container(live.container.delete()).await
    }

    /// Does what takes its time while there is no container to ask.
    async fn without_container<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(request) = self.requests.recv(), if self.postponed.len() < QUEUE => match request {
                    // A dropped answer says that there is no container.
                    Request::Container(_) => {}
                    other => self.postponed.push_back(other),
                },
            }
        }
    }
}

impl Live {
    async fn step(&mut self, step: Step) {
        match step {
            Step::Guest(event) => self.container.guest_event(event),
            Step::VmEnded(reason) => {
                self.take_waiting_events();
                self.container.vm_ended(&reason).await;
            }
            Step::KillOverdue => {
                self.container.vm_ended("The guest does not end the container after SIGKILL").await
            }
            Step::Request(_) | Step::End => {}
        }
    }

    async fn request(&mut self, request: ContainerRequest) {
        let container = &mut self.container;
        // An answer that nobody waits for is no error: the caller has gone away.
        match request {
            ContainerRequest::Exec(request, answer) => drop(answer.send(container.exec(request))),
            ContainerRequest::Start(exec_id, answer) => {
                let started = container.start(&exec_id).await;
                if started.is_err() && exec_id.is_empty() {
                    self.settle().await;
                }
                drop(answer.send(started));
            }
            ContainerRequest::Opening(exec_id, answer) => drop(answer.send(container.opening(&exec_id))),
            ContainerRequest::Outputs(exec_id, answer) => drop(answer.send(container.outputs(&exec_id))),
            ContainerRequest::State(exec_id, answer) => drop(answer.send(container.state(&exec_id))),
            ContainerRequest::Wait(exec_id, answer) => drop(answer.send(container.wait(&exec_id))),
            ContainerRequest::Kill { exec_id, signal, all, answer } => {
                drop(answer.send(container.kill(&exec_id, signal, all).await));
            }
            ContainerRequest::Resize { exec_id, size, answer } => {
                drop(answer.send(container.resize(&exec_id, size).await));
            }
            ContainerRequest::CloseStdin(exec_id, answer) => {
                drop(answer.send(container.close_stdin(&exec_id)));
            }
            ContainerRequest::Pause(answer) => drop(answer.send(container.pause().await)),
            ContainerRequest::Resume(answer) => drop(answer.send(container.resume().await)),
            ContainerRequest::Hold(freeze, answer) => drop(answer.send(container.hold(freeze).await)),
            ContainerRequest::Release(hold, answer) => drop(answer.send(container.release(hold).await)),
            ContainerRequest::ReadUpper(answer) => drop(answer.send(container.read_upper().await)),
            ContainerRequest::ReadMerged(answer) => drop(answer.send(container.read_merged().await)),
            ContainerRequest::Export(answer) => drop(answer.send(container.export().await)),
            ContainerRequest::Pids(answer) => drop(answer.send(container.pids().await)),
            ContainerRequest::Stats(answer) => drop(answer.send(container.stats().await)),
            ContainerRequest::Update(resources, answer) => {
                drop(answer.send(container.update(resources).await));
            }
        }
    }

    /// An exit that came before the VM's end is an exit of its own.
    fn take_waiting_events(&mut self) {
        for _ in 0..self.events.max_capacity() {
            let Ok(event) = self.events.try_recv() else { return };
            self.container.guest_event(event);
        }
    }

    /// Whoever sees a start fail looks at the state next, to delete the container.
    async fn settle(&mut self) {
        let deadline = Instant::now() + SETTLE_LIMIT;
        while self.container.is_live() {
            match timeout_at(deadline, self.events.recv()).await {
                Ok(Some(event)) => self.container.guest_event(event),
                _ => return,
            }
        }
    }
}

async fn or_never<T>(future: Option<impl Future<Output = T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn task_create(identity: &Identity, request: &CreateRequest) -> TaskCreate {
    let names = request.names.clone();
    let io = TaskIO {
        stdin: names.stdin,
        stdout: names.stdout,
        stderr: names.stderr,
        terminal: names.terminal,
        ..TaskIO::default()
    };
    TaskCreate {
        container_id: identity.container_id.clone(),
        bundle: request.bundle.display().to_string(),
        rootfs: request.rootfs.clone(),
        io: Some(io).into(),
        ..TaskCreate::default()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::*;
    use crate::events;

    const LIMIT: Duration = Duration::from_secs(20);

    fn driver() -> (Handle, Driver) {
        let identity = Identity {
            namespace: "ns".into(),
            container_id: "c1".into(),
            config: Arc::new(Config::default()),
            publisher: events::spawn("/nonexistent/ttrpc", "ns").0,
        };
        let (handle, requests) = Handle::new();
        let postponed = VecDeque::new();
        (handle.clone(), Driver { identity, handle, requests, postponed, warm: None, live: None })
    }

    #[tokio::test]
    async fn who_asks_for_a_container_in_the_making_is_told_at_once() {
        let (handle, mut driver) = driver();
        let (finish, finished) = oneshot::channel::<()>();
        let other = handle.clone();
        let shutdown = tokio::spawn(async move { other.ask(Request::Shutdown).await });
        let asking = tokio::spawn(async move {
            let state = handle.ask_container(|answer| ContainerRequest::State(String::new(), answer));
            let answer = timeout(LIMIT, state).await;
            drop(finish);
            answer
        });
        let _ = driver.without_container(finished).await;
        let error = asking.await.unwrap().expect("an answer before the end of the work").unwrap_err();
        assert!(matches!(error, TaskError::NotFound(_)), "{error}");
        // What can wait is done afterwards.
        timeout(LIMIT, driver.run()).await.expect("the shutdown request ends the driver");
        shutdown.await.unwrap().unwrap();
    }
}
