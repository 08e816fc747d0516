//! The process that owns a VM and its unions.
//!
//! ```text
//!   first order (stdin) ─ VM ─┐
//!   orders (unions.sock) ─────┴─> Owner ── a free port ──> Member: mounted ── unmounted, changes on disk
//!                                   ^                                              │
//!                                   ├── others are there: the port is cleared <────┤
//!                                   └── it was the last: no more orders, the VM ends <┘
//! ```
//!
//! One task owns the ports; members tell it what became of them. Whether an order is taken is decided there and nowhere
//! else, so none is taken by a VM that ends. Invariant: the VM lives as long as it has a union.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::geteuid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};
use vmctr_vmm::config::Config;
use vmctr_vmm::error_chain;
use vmctr_vmm::run_dir::{Role, RunDir};

use super::check::Plan;
use super::helper::Helper;
use super::member::{Ended, Failed, Prepared};
use super::mount;
use super::order::{Answer, MAX_ORDER, Order};
use super::ports::Ports;
use super::{options, owners, record};
use crate::failure::one_line;

/// Events that may wait.
const QUEUE: usize = 32;

/// Who orders has the order ready, and waits for answers.
const PEER_LIMIT: Duration = Duration::from_secs(5);

/// How long an order waits for a union that was unmounted a moment ago to leave its place.
const LEAVING_LIMIT: Duration = Duration::from_secs(3);
const LEAVING_POLL: Duration = Duration::from_millis(20);

/// Pause after a failed accept, so that running out of files does not spin.
const RETRY: Duration = Duration::from_millis(100);

/// What happens to an owner.
enum Event {
    /// And since when it waits for another to leave its mountpoint.
    Order(Plan, UnixStream, Instant),
    Failed(u32, Failed, Asker),
    Ended(u32, Ended),
    /// Out of the VM, and whether its port is free.
    Removed(u32, Ended, bool),
    Terminated,
}

/// Who waits for the mount.
enum Asker {
    Parent,
    Peer(UnixStream),
}

impl Asker {
    /// Fails when nobody waits any more.
    async fn tell(&mut self, answer: &Answer) -> anyhow::Result<()> {
        match self {
            Self::Parent => mount::answer(answer),
            Self::Peer(stream) => Ok(timeout(PEER_LIMIT, stream.write_all(&answer.to_line()?)).await??),
        }
    }
}

/// A VM and its unions.
struct Owner {
    config: Config,
    helper: Arc<Helper>,
    run_dir: RunDir,
    ports: Ports,
    /// Where the union of each port is mounted.
    places: HashMap<u32, PathBuf>,
    events: mpsc::Sender<Event>,
    end: watch::Sender<bool>,
    /// Takes orders; none when it does not, or no more.
    listening: Option<AbortHandle>,
}

/// Starts the VM, mounts this union, and serves it and what else is ordered until all are gone. An error says why there
/// is nothing.
pub async fn run(config: &Config, plan: Plan) -> anyhow::Result<()> {
    let run_dir = RunDir::create(&config.run_dir, owners::this(config))?;
    let started = async {
        log_to(&record::log(run_dir.path())).context("Cannot write the log")?;
        let prepared = Prepared::new(config, plan.clone(), &record::log(run_dir.path())).await?;
        match start_vm(config, &run_dir).await {
            Ok(helper) => Ok((helper, prepared)),
            Err(error) => {
                prepared.undo().await;
                Err(error)
            }
        }
    };
    let (helper, prepared) = match started.await {
        Ok(started) => started,
        Err(error) => {
            // The first error is the one to tell.
            let _ = run_dir.remove();
            return Err(error);
        }
    };
    let (events, queue) = mpsc::channel(QUEUE);
    let owner = Owner {
        config: config.clone(),
        ports: Ports::new(helper.vm().union_ports()),
        helper: Arc::new(helper),
        run_dir,
        places: HashMap::new(),
        events,
        end: watch::Sender::new(false),
        listening: None,
    };
    owner.serve(queue, plan, prepared).await;
    Ok(())
}

async fn start_vm(config: &Config, run_dir: &RunDir) -> anyhow::Result<Helper> {
    let helper = Helper::start(config, run_dir).await?;
    run_dir.record(Role::Qemu, helper.vm().qemu_pid())?;
    Ok(helper)
}

/// From here on, what is logged goes to the file; so does what libraries print.
fn log_to(path: &Path) -> io::Result<()> {
    let log = File::options().create(true).append(true).open(path)?;
    Ok(rustix::stdio::dup2_stderr(&log)?)
}

impl Owner {
    async fn serve(mut self, mut queue: mpsc::Receiver<Event>, plan: Plan, prepared: Prepared) {
        if !options::own_vm(&plan.options)
            && let Err(error) = self.listen()
        {
            // Others will have VMs of their own.
            error!("Cannot take orders: {error}");
        }
        self.end_on_sigterm();
        if let Some(port) = self.ports.take() {
            self.places.insert(port, plan.mountpoint);
            self.mount(port, prepared, Asker::Parent);
        }
        while let Some(event) = queue.recv().await {
            self.handle(event).await;
            if self.ports.taken() == 0 {
                break;
            }
        }
        info!("No union is left");
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Order(plan, stream, since) if self.is_leaving(&plan, since) => {
                self.order_later(plan, stream, since)
            }
            Event::Order(plan, stream, _) => self.order(plan, Asker::Peer(stream)).await,
            Event::Failed(port, failed, mut asker) => {
                self.leave(port, failed.port_is_free).await;
                // Who does not wait any more has nothing to undo.
                let _ = asker.tell(&Answer::Failed(one_line(&failed.error))).await;
            }
            Event::Ended(port, ended) if self.ports.taken() == 1 => {
                self.leave(port, true).await;
                finish(ended).await;
            }
            Event::Ended(port, ended) => self.remove(port, ended),
            Event::Removed(port, ended, is_free) => {
                self.leave(port, is_free).await;
                finish(ended).await;
            }
            Event::Terminated => {
                self.close();
                self.end.send_replace(true);
            }
        }
    }

    /// Whether the union before it at this place is to be waited for.
    fn is_leaving(&self, plan: &Plan, since: Instant) -> bool {
        self.is_there(plan) && since.elapsed() < LEAVING_LIMIT
    }

    fn is_there(&self, plan: &Plan) -> bool {
        self.places.values().any(|place| *place == plan.mountpoint)
    }

    fn order_later(&self, plan: Plan, stream: UnixStream, since: Instant) {
        let events = self.events.clone();
        tokio::spawn(async move {
            sleep(LEAVING_POLL).await;
            // Without an owner the stream closes, which tells.
            let _ = events.send(Event::Order(plan, stream, since)).await;
        });
    }

    async fn order(&mut self, plan: Plan, mut asker: Asker) {
        let usable = self.listening.is_some() && self.helper.vm().state().borrow().is_usable();
        let is_there = self.is_there(&plan);
        let port = if usable && !is_there { self.ports.take() } else { None };
        let answer = if is_there || port.is_some() { Answer::Taken } else { Answer::Declined };
        let told = asker.tell(&answer).await;
        if is_there {
            let why = record::why_taken(&self.config.run_dir, &plan.mountpoint);
            // As above.
            let _ = asker.tell(&Answer::Failed(why)).await;
        }
        match (port, told) {
            (Some(port), Ok(())) => {
                self.places.insert(port, plan.mountpoint.clone());
                self.prepare_and_mount(port, plan, asker);
            }
            (Some(port), Err(_)) => self.ports.free(port),
            (None, _) => {}
        }
    }

    fn prepare_and_mount(&self, port: u32, plan: Plan, asker: Asker) {
        let (config, log) = (self.config.clone(), record::log(self.run_dir.path()));
        let prepare = async move { Prepared::new(&config, plan, &log).await };
        self.spawn_member(port, prepare, asker);
    }

    fn mount(&self, port: u32, prepared: Prepared, asker: Asker) {
        self.spawn_member(port, async { Ok(prepared) }, asker);
    }

    /// A union's whole life.
    fn spawn_member(
        &self,
        port: u32,
        prepare: impl Future<Output = anyhow::Result<Prepared>> + Send + 'static,
        mut asker: Asker,
    ) {
        let (helper, events, end) = (Arc::clone(&self.helper), self.events.clone(), self.end.subscribe());
        tokio::spawn(async move {
            let mounted = match prepare.await {
                Ok(prepared) => prepared.mount(helper, port).await,
                Err(error) => Err(Failed { error, port_is_free: true }),
            };
            let event = match mounted {
                Ok(member) => {
                    if asker.tell(&Answer::Ready).await.is_err() {
                        warn!("Nobody waits for the mount any more");
                        member.take_away();
                    }
                    Event::Ended(port, member.serve(end).await)
                }
                Err(failed) => Event::Failed(port, failed, asker),
            };
            // The owner waits as long as a port is taken.
            let _ = events.send(event).await;
        });
    }

    /// Takes a union out of the VM, which others still use.
    fn remove(&self, port: u32, ended: Ended) {
        let (helper, events) = (Arc::clone(&self.helper), self.events.clone());
        tokio::spawn(async move {
            let removed = helper.remove(port).await;
            if let Err(error) = &removed {
                warn!("Port {port} stays in use, so this VM takes no more unions: {}", error_chain(error));
            }
            // As above.
            let _ = events.send(Event::Removed(port, ended, removed.is_ok())).await;
        });
    }

    /// A union has left its port. With the last of them the VM ends.
    async fn leave(&mut self, port: u32, is_free: bool) {
        if is_free {
            self.ports.free(port)
        } else {
            self.ports.spoil(port)
        }
        self.places.remove(&port);
        if self.ports.taken() == 0 {
            self.close();
            self.helper.stop().await;
            if let Err(error) = self.run_dir.remove() {
                error!("{}", error_chain(&error));
            }
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let listener = UnixListener::bind(owners::socket(self.run_dir.path()))?;
        self.listening = Some(tokio::spawn(accept(listener, self.events.clone())).abort_handle());
        Ok(())
    }

    /// Whoever comes now finds the connection closed, and starts a VM.
    fn close(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
            // It goes with the run directory otherwise.
            let _ = std::fs::remove_file(owners::socket(self.run_dir.path()));
        }
    }

    fn end_on_sigterm(&self) {
        let events = self.events.clone();
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => drop(tokio::spawn(async move {
                while terminate.recv().await.is_some() && events.send(Event::Terminated).await.is_ok() {}
            })),
            Err(error) => warn!("SIGTERM will end this process at once: {error}"),
        }
    }
}

/// It closes streams and removes files, which blocks.
async fn finish(ended: Ended) {
    if let Err(error) = spawn_blocking(|| ended.finish()).await {
        error!("A union did not end well: {error}");
    }
}

async fn accept(listener: UnixListener, events: mpsc::Sender<Event>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(hear(stream, events.clone()))),
            Err(error) => {
                warn!("Cannot accept an order: {error}");
                sleep(RETRY).await;
            }
        }
    }
}

async fn hear(mut stream: UnixStream, events: mpsc::Sender<Event>) {
    match timeout(PEER_LIMIT, read_order(&mut stream)).await {
        // Without an owner the stream closes, which tells.
        Ok(Ok(plan)) => drop(events.send(Event::Order(plan, stream, Instant::now())).await),
        Ok(Err(error)) => warn!("An order is not understood: {error:#}"),
        Err(_) => warn!("An order did not come in time"),
    }
}

async fn read_order(stream: &mut UnixStream) -> anyhow::Result<Plan> {
    anyhow::ensure!(stream.peer_cred()?.uid() == geteuid().as_raw(), "it comes from another user");
    let mut bytes = Vec::new();
    stream.take(MAX_ORDER).read_to_end(&mut bytes).await?;
    match serde_json::from_slice(&bytes)? {
        Order::Union(plan) => Ok(plan),
        Order::Container(_) => anyhow::bail!("it is for a container"),
    }
}
