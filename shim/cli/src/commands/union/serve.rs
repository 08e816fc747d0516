//! The background process of a mount.
//!
//! ```text
//!   order (stdin) ─ locks ─ run directory, log ─┬ union: VM ─ union in the guest ┬ streams ─ mount ─ "ready" (stdout)
//!        │                                      └ container: its shim, its guest ┘              │
//!        └ an error undoes what is there, and is the answer            umount(2), or SIGTERM: taken away lazily
//!                                                                                               │
//!                      container: streams close                                                 │
//!                      union: changes to disk ─ VM and share end ─ run directory removed <──────┘
//! ```
//!
//! Invariant: it lives as long as the mount is in use. A VM or container that ends leaves the mount where it is, and
//! all that is asked of it fails: what lies under a mountpoint is nobody's to write to by surprise. What could not be
//! written to disk in the end stays noted in the run directory until somebody has seen it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use rustix::mount::MountAttrFlags;
use rustix::process::setsid;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};
use vmctr_fileshare::export::host::{Cache, Config as MountConfig, Export, Figures, Streams, unmount};
use vmctr_vmm::config::Config;
use vmctr_vmm::error_chain;
use vmctr_vmm::run_dir::RunDir;

use super::check::Plan;
use super::helper::Helper;
use super::locks::Locks;
use super::mount::{Answer, answer};
use super::order::Order;
use super::target::Target;
use super::{options, record};
use crate::failure::{Outcome, Verdict, one_line};

/// Relay threads: more of them let more processes wait for the guest at the same time.
const LANES: usize = 4;

/// A VM of one union has this one export.
const EXPORT: u32 = 0;

/// How long what a container shows may be remembered.
const MEMORY: Duration = Duration::from_secs(1);

/// Between two looks whether the mount is still there.
const POLL: Duration = Duration::from_millis(50);

/// How long a mount that is to end waits for whoever still has a file open.
const GRACE: Duration = Duration::from_secs(10);

/// A mount. Its folders stay locked until it is gone.
struct Mounted {
    export: Export,
    /// The VM that is its own; a container's is not.
    helper: Option<Helper>,
    run_dir: RunDir,
    order: Order,
    terminate: Signal,
    _locks: Locks,
}

/// Mounts what standard input says, and serves it until it is unmounted.
pub async fn run(config: &Config) -> Outcome {
    // It is a session's leader already where the parent made it one.
    let _ = setsid();
    match start(config).await {
        Ok(mounted) => {
            if answer(&Answer::Ready).is_err() {
                warn!("Nobody waits for the mount any more");
                mounted.take_away();
            }
            mounted.serve().await;
            Ok(Verdict::Good)
        }
        Err(error) => {
            answer(&Answer::Failed(one_line(&error)))?;
            Ok(Verdict::Bad)
        }
    }
}

async fn start(config: &Config) -> anyhow::Result<Mounted> {
    let terminate = signal(SignalKind::terminate())?;
    let order: Order = serde_json::from_reader(io::stdin()).context("Cannot read what to mount")?;
    let wanted = order.clone();
    let locks = spawn_blocking(move || Locks::take(&wanted)).await??;
    let run_dir = RunDir::create(&config.run_dir, record::owner(order.mountpoint()))?;
    match start_in(config, &order, &run_dir).await {
        Ok((helper, export)) => {
            info!("Mounted");
            Ok(Mounted { export, helper, run_dir, order, terminate, _locks: locks })
        }
        Err(error) => {
            // The first error is the one to tell.
            let _ = run_dir.remove();
            Err(error)
        }
    }
}

async fn start_in(
    config: &Config,
    order: &Order,
    run_dir: &RunDir,
) -> anyhow::Result<(Option<Helper>, Export)> {
    log_to(&record::log(run_dir.path())).context("Cannot write the log")?;
    record::write(run_dir.path(), order).context("Cannot write down what is mounted")?;
    match order {
        Order::Container(target) => Ok((None, mount_container(target).await?)),
        Order::Union(plan) => {
            let helper = Helper::start(config, plan.share(), run_dir).await?;
            match mount_union(&helper, plan).await {
                Ok(export) => Ok((Some(helper), export)),
                Err(error) => {
                    helper.stop().await;
                    Err(error)
                }
            }
        }
    }
}

async fn mount_union(helper: &Helper, plan: &Plan) -> anyhow::Result<Export> {
    helper.export(plan, EXPORT).await?;
    let mut turns = Vec::new();
    for _ in 0..LANES {
        turns.push(helper.dial().await?);
    }
    let streams = Streams { turns, waits: helper.dial().await? };
    let mut restrictions = options::restrictions(&plan.options);
    if plan.top.is_none() {
        restrictions |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let layers = if options::reads_on_host(&plan.options) { plan.lowers.clone() } else { vec![] };
    let config =
        MountConfig { restrictions, layers, export: EXPORT, ..MountConfig::new(plan.mountpoint.clone()) };
    Ok(spawn_blocking(move || Export::start(&config, streams)).await??)
}

async fn mount_container(target: &Target) -> anyhow::Result<Export> {
    let export = target.export().await?;
    let mut config = MountConfig {
        source: target.container.clone(),
        cache: Cache::For(MEMORY),
        export,
        ..MountConfig::new(target.mountpoint.clone())
    };
    if target.read_only {
        config.restrictions |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let target = target.clone();
    let mount = move || {
        let turns = (0..LANES).map(|_| target.dial()).collect::<Result<_, _>>()?;
        Ok(Export::start(&config, Streams { turns, waits: target.dial()? })?)
    };
    spawn_blocking(mount).await?
}

/// From here on, what is logged goes to the file; so does what libraries print.
fn log_to(path: &Path) -> io::Result<()> {
    let log = File::options().create(true).append(true).open(path)?;
    Ok(rustix::stdio::dup2_stderr(&log)?)
}

impl Mounted {
    async fn serve(mut self) {
        let was_lost = self.until_gone().await;
        let lost = match &self.helper {
            // Whoever used it has seen errors.
            Some(_) if was_lost => Ok(()),
            Some(helper) => flush(helper).await,
            None => Ok(()),
        };
        if let Err(why) = &lost {
            self.note(why);
        }
        let Self { export, helper, run_dir, .. } = self;
        if let Some(helper) = helper {
            helper.stop().await;
        }
        drop(export);
        if lost.is_ok()
            && let Err(error) = run_dir.remove()
        {
            error!("{}", error_chain(&error));
        }
    }

    /// Returns when nobody uses the mount any more; whether it failed before.
    async fn until_gone(&mut self) -> bool {
        let (mut lost, mut until, mut told) = (false, None, Figures::default());
        while !self.export.is_gone() && until.is_none_or(|until| Instant::now() < until) {
            if let Some(why) = self.export.lost()
                && !std::mem::replace(&mut lost, true)
            {
                self.note(&format!("The mount fails: {why}; {}", self.cause()));
            }
            let figures = self.export.figures();
            if figures != told {
                // For whoever asks: a union does not depend on them.
                let _ = record::write_relay(self.run_dir.path(), &figures.clone().into());
                told = figures;
            }
            tokio::select! {
                () = sleep(POLL) => {}
                _ = self.terminate.recv() => {
                    self.take_away();
                    until = Some(Instant::now() + GRACE);
                }
            }
        }
        lost
    }

    fn cause(&self) -> String {
        match &self.helper {
            Some(helper) => format!("the VM is {}", *helper.vm().state().borrow()),
            None => "the container or its VM has ended".to_owned(),
        }
    }

    fn note(&self, why: &str) {
        error!("{why}");
        if let Err(error) = record::note_lost(self.run_dir.path(), why) {
            error!("Cannot write down what was lost: {error}");
        }
    }

    fn take_away(&self) {
        let mountpoint = self.order.mountpoint();
        if let Err(error) = unmount(mountpoint, true) {
            warn!("Cannot unmount {}: {error}", mountpoint.display());
        }
    }
}

/// Has the VM write its changes to disk.
async fn flush(helper: &Helper) -> Result<(), String> {
    helper.flush().await.map_err(|error| format!("Changes may be lost: {}", error_chain(&error)))
}
