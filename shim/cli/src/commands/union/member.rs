//! One union in a VM: its locks, run directory and share daemon, its port of the VM, its mount.
//!
//! ```text
//!   Prepared ── port ──> Member ── unmounted ── Ended ── changes on disk, noted if not ── Ended::finish
//!     locks, run directory, share daemon                   └ meanwhile its owner frees the port, or ends the VM
//! ```
//!
//! Invariant: it touches no other union of the VM. When its share daemon ends, its streams are closed, so that nobody
//! waits for files that do not come.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::ChildStderr;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::mount::MountAttrFlags;
use rustix::net::{Shutdown, shutdown};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{error, info, warn};
use vmctr_fileshare::export::host::{Config as MountConfig, Export, Streams};
use vmctr_fileshare::share::{Exit, Fsd, Locks, spawn};
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::{Role, RunDir};
use vmctr_vmm::{LogRate, binaries, error_chain};

use super::check::Plan;
use super::helper::Helper;
use super::order::Order;
use super::serve::LANES;
use super::served::Served;
use super::{beside, options, record};

const DAEMON: &str = "vmctr-fsd";

/// How long a daemon that was killed may take to end: it may wait for a disk.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A log line of the daemon is cut here: it works on what a hostile guest sends.
const LINE_LIMIT: u64 = 2048;

/// A union that lacks a VM. Dropping it leaves its run directory; [`Prepared::undo`] does not.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    run_dir: RunDir,
    fsd: Fsd,
    locks: Locks,
}

/// A union that is mounted.
#[derive(Debug)]
pub struct Member {
    helper: Arc<Helper>,
    port: u32,
    served: Served,
    fsd: Arc<Fsd>,
    /// How its share daemon ended, if it did.
    exit: Arc<OnceLock<Exit>>,
}

/// A union that nobody uses any more; its VM still has what belongs to it.
#[derive(Debug)]
pub struct Ended {
    served: Served,
    fsd: Arc<Fsd>,
    lost: bool,
}

/// A union was not mounted. Nothing is left, but for a port that may not be free.
#[derive(Debug)]
pub struct Failed {
    /// What went wrong.
    pub error: anyhow::Error,
    /// Whether the port can be used again.
    pub port_is_free: bool,
}

impl Prepared {
    /// Locks the folders, starts the share daemon. `log` is what the run directory shows as the union's log.
    pub async fn new(config: &Config, plan: Plan, log: &std::path::Path) -> anyhow::Result<Self> {
        let order = Order::Union(plan.clone());
        let (wanted, place) = (plan.clone(), config.run_dir.clone());
        let claim = move || {
            let locks = Locks::take(&wanted.share(), None)?;
            anyhow::Ok((locks, record::claim(&place, &wanted.mountpoint)?))
        };
        let (locks, run_dir) = spawn_blocking(claim).await??;
        let started = async {
            fs::hard_link(log, record::log(run_dir.path())).context("Cannot share the log")?;
            record::write(run_dir.path(), &order).context("Cannot write down what is mounted")?;
            let (place, wanted) = (config.run_dir.clone(), plan.clone());
            spawn_blocking(move || beside::check(&place, &wanted)).await??;
            start_daemon(config, &plan, &run_dir).await
        };
        match started.await {
            Ok(fsd) => Ok(Self { plan, run_dir, fsd, locks }),
            Err(error) => {
                // The first error is the one to tell.
                let _ = run_dir.remove();
                Err(error)
            }
        }
    }

    /// Leaves nothing. A share daemon that does not end keeps its folders locked until it does, and holds nobody up.
    pub async fn undo(self) {
        let Self { run_dir, fsd, locks, .. } = self;
        let ended = spawn_blocking(move || drop((fsd, locks)));
        if timeout(END_LIMIT, ended).await.is_err() {
            warn!("The share daemon was killed and does not end yet");
        }
        if let Err(error) = run_dir.remove() {
            error!("{}", error_chain(&error));
        }
    }

    /// Mounts it by the VM.
    pub async fn mount(mut self, helper: Arc<Helper>, port: u32) -> Result<Member, Failed> {
        let plugged = self.plug(&helper, port).await;
        if let Err(error) = plugged {
            self.undo().await;
            return Err(Failed { error, port_is_free: true });
        }
        match self.export(&helper, port).await {
            Ok((export, handles)) => Ok(self.into_member(helper, port, export, handles)),
            Err(error) => {
                let removed = helper.remove(port).await;
                if let Err(error) = &removed {
                    warn!("Port {port} stays in use: {}", error_chain(error));
                }
                self.undo().await;
                Err(Failed { error, port_is_free: removed.is_ok() })
            }
        }
    }

    async fn plug(&mut self, helper: &Helper, port: u32) -> anyhow::Result<()> {
        self.run_dir.record(Role::Qemu, helper.vm().qemu_pid())?;
        let socket = self.fsd.socket.take().context("The share daemon has no connection")?;
        Ok(helper.vm().plug_union(port, socket).await?)
    }

    async fn export(&self, helper: &Helper, port: u32) -> anyhow::Result<(Export, Vec<OwnedFd>)> {
        helper.add(&self.plan, port).await?;
        let (mut turns, mut handles) = (Vec::new(), Vec::new());
        for _ in 0..LANES {
            let (stream, handle) = helper.dial().await?;
            turns.push(stream);
            handles.push(handle);
        }
        let (waits, handle) = helper.dial().await?;
        handles.push(handle);
        let config = mount_config(&self.plan, port);
        let start = move || Export::start(&config, Streams { turns, waits });
        Ok((spawn_blocking(start).await??, handles))
    }

    fn into_member(self, helper: Arc<Helper>, port: u32, export: Export, handles: Vec<OwnedFd>) -> Member {
        let Self { plan, run_dir, fsd, locks } = self;
        let (fsd, exit) = (Arc::new(fsd), Arc::new(OnceLock::new()));
        let (watched, told) = (Arc::clone(&fsd), Arc::clone(&exit));
        spawn_blocking(move || {
            // It is told once only.
            let _ = told.set(watched.wait());
            for handle in &handles {
                // One that is closed already is as good.
                let _ = shutdown(handle, Shutdown::Both);
            }
        });
        if let Err(error) = record::write_device(run_dir.path(), &plan.mountpoint) {
            warn!("Cannot write down which mount it is: {error}");
        }
        info!("Mounted {}", plan.mountpoint.display());
        Member { helper, port, served: Served::new(export, run_dir, plan.mountpoint, locks), fsd, exit }
    }
}

impl Member {
    /// Unmounts it, whoever uses it.
    pub fn take_away(&self) {
        self.served.take_away();
    }

    /// Serves it until nobody uses it any more and its changes are on disk.
    pub async fn serve(self, end: watch::Receiver<bool>) -> Ended {
        let was_lost = self.served.until_gone(end, || self.cause()).await;
        // Whoever used one that failed has seen errors.
        let flushed = if was_lost { Ok(()) } else { self.flush().await };
        if let Err(why) = &flushed {
            self.served.note(why);
        }
        Ended { served: self.served, fsd: self.fsd, lost: flushed.is_err() }
    }

    async fn flush(&self) -> Result<(), String> {
        let fsd = Arc::clone(&self.fsd);
        let flushed = tokio::select! {
            flushed = self.helper.flush(self.port) => flushed.map_err(|error| error_chain(&error)),
            _ = spawn_blocking(move || fsd.wait()) => Err(self.cause()),
        };
        flushed.map_err(|why| format!("Changes may be lost: {why}"))
    }

    fn cause(&self) -> String {
        let state = self.helper.vm().state().borrow().clone();
        match self.exit.get() {
            Some(exit) if state.is_usable() => format!("the share daemon ended ({exit})"),
            _ => format!("the VM is {state}"),
        }
    }
}

impl Ended {
    /// Forgets it. The VM has nothing of it any more, or has ended.
    pub fn finish(self) {
        if let Err(error) = self.fsd.kill() {
            error!("Cannot stop the share daemon: {error}");
        }
        self.served.finish(self.lost);
    }
}

fn mount_config(plan: &Plan, port: u32) -> MountConfig {
    let mut restrictions = options::restrictions(&plan.options);
    if plan.top.is_none() {
        restrictions |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let on_host = options::reads_on_host(&plan.options);
    let layers = if on_host { plan.lowers.clone() } else { vec![] };
    let upper = plan.top.as_ref().filter(|_| on_host).map(|top| top.upper.clone());
    MountConfig { restrictions, layers, upper, export: port, ..MountConfig::new(plan.mountpoint.clone()) }
}

async fn start_daemon(config: &Config, plan: &Plan, run_dir: &RunDir) -> anyhow::Result<Fsd> {
    let (share, dir) = (plan.share(), run_dir.path().to_owned());
    let level = config.log.level.as_str();
    // virtiofsd's debug lines tell of every single request.
    let level = if level == "debug" { "debug,virtiofsd=info" } else { level };
    let start = move || anyhow::Ok(spawn(&binaries::find(DAEMON)?, &share, &dir, level)?);
    let mut fsd = spawn_blocking(start).await??;
    run_dir.record(Role::Fsd, fsd.pid())?;
    fsd.stderr.take().map_or(Ok(()), forward_log).context("Cannot read the share daemon's log")?;
    Ok(fsd)
}

/// Reads on whatever comes, so that the daemon never waits; what is too much is dropped.
fn forward_log(stderr: ChildStderr) -> io::Result<()> {
    let forward = move || {
        let mut lines = BufReader::new(stderr);
        let mut rate = LogRate::new(Instant::now());
        let mut line = Vec::new();
        // The end of the stream is the end of the daemon, which is watched elsewhere.
        while let Ok(1..) = (&mut lines).take(LINE_LIMIT).read_until(b'\n', &mut line) {
            let text = String::from_utf8_lossy(&line);
            rate.admit(Instant::now(), text.trim()).for_each(|line| log_line(&line));
            line.clear();
        }
    };
    thread::Builder::new().name("fsd-log".to_owned()).spawn(forward).map(drop)
}

/// The daemon writes the level first.
fn log_line(line: &str) {
    match line.split_once(' ') {
        Some(("INFO" | "DEBUG" | "TRACE", text)) => info!(target: "fsd", "{text}"),
        Some(("ERROR", text)) => error!(target: "fsd", "{text}"),
        Some(("WARN", text)) => warn!(target: "fsd", "{text}"),
        _ => warn!(target: "fsd", "{line}"),
    }
}
