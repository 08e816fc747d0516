//! The background process of a union.
//!
//! ```text
//!   order (stdin) ─ locks ─ run directory, log ─ VM ─ union in the guest ─ streams ─ mount ─ "ready" (stdout)
//!        │                                                                             │
//!        └ an error undoes what is there, and is the answer            umount(2), or SIGTERM: taken away lazily
//!                                                                                      │
//!                                                     changes to disk ─ VM and share end ─ run directory removed
//! ```
//!
//! Invariant: it lives as long as the mount is in use. A VM that ends leaves the mount where it is, and all that is
//! asked of it fails: what lies under a mountpoint is nobody's to write to by surprise.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::mount::MountAttrFlags;
use rustix::process::setsid;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};
use vmctr_fileshare::export::host::{Config as MountConfig, Export, Figures, Streams, unmount};
use vmctr_vmm::config::Config;
use vmctr_vmm::error_chain;
use vmctr_vmm::run_dir::RunDir;

use super::check::Plan;
use super::helper::Helper;
use super::locks::Locks;
use super::mount::{Answer, answer};
use super::{options, record};
use crate::failure::{Outcome, Verdict, one_line};

/// Relay threads: more of them let more processes wait for the guest at the same time.
const LANES: usize = 4;

/// A VM of one union has this one export.
const EXPORT: u32 = 0;

/// Between two looks whether the mount is still there.
const POLL: Duration = Duration::from_millis(50);

/// How long a union that is to end waits for whoever still has a file open.
const GRACE: Duration = Duration::from_secs(10);

/// A mounted union. Its folders stay locked until it is gone.
struct Union {
    export: Export,
    helper: Helper,
    run_dir: RunDir,
    mountpoint: PathBuf,
    terminate: Signal,
    _locks: Locks,
}

/// Mounts what standard input says, and serves it until it is unmounted.
pub async fn run(config: &Config) -> Outcome {
    // It is a session's leader already where the parent made it one.
    let _ = setsid();
    match start(config).await {
        Ok(union) => {
            if answer(&Answer::Ready).is_err() {
                warn!("Nobody waits for the mount any more");
                union.take_away();
            }
            union.serve().await;
            Ok(Verdict::Good)
        }
        Err(error) => {
            answer(&Answer::Failed(one_line(&error)))?;
            Ok(Verdict::Bad)
        }
    }
}

async fn start(config: &Config) -> anyhow::Result<Union> {
    let terminate = signal(SignalKind::terminate())?;
    let plan: Plan = serde_json::from_reader(io::stdin()).context("Cannot read what to mount")?;
    let wanted = plan.clone();
    let locks = spawn_blocking(move || Locks::take(&wanted)).await??;
    let run_dir = RunDir::create(&config.run_dir, record::owner(&plan.mountpoint))?;
    match start_in(config, &plan, &run_dir).await {
        Ok((helper, export)) => {
            info!("The union is mounted");
            Ok(Union { export, helper, run_dir, mountpoint: plan.mountpoint, terminate, _locks: locks })
        }
        Err(error) => {
            // The first error is the one to tell.
            let _ = run_dir.remove();
            Err(error)
        }
    }
}

async fn start_in(config: &Config, plan: &Plan, run_dir: &RunDir) -> anyhow::Result<(Helper, Export)> {
    log_to(&record::log(run_dir.path())).context("Cannot write the log")?;
    record::write(run_dir.path(), plan).context("Cannot write down what the union is")?;
    let helper = Helper::start(config, plan.share(), run_dir).await?;
    match mount(&helper, plan).await {
        Ok(export) => Ok((helper, export)),
        Err(error) => {
            helper.stop().await;
            Err(error)
        }
    }
}

async fn mount(helper: &Helper, plan: &Plan) -> anyhow::Result<Export> {
    helper.export(plan, EXPORT).await?;
    let mut turns = Vec::new();
    for _ in 0..LANES {
        turns.push(helper.dial().await?);
    }
    let streams = Streams { turns, waits: helper.dial().await? };
    let config = mount_config(plan);
    Ok(spawn_blocking(move || Export::start(&config, streams)).await??)
}

fn mount_config(plan: &Plan) -> MountConfig {
    let mut restrictions = options::restrictions(&plan.options);
    if plan.top.is_none() {
        restrictions |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let layers = if options::reads_on_host(&plan.options) { plan.lowers.clone() } else { vec![] };
    MountConfig { restrictions, layers, export: EXPORT, ..MountConfig::new(plan.mountpoint.clone()) }
}

/// From here on, what is logged goes to the file; so does what libraries print.
fn log_to(path: &Path) -> io::Result<()> {
    let log = File::options().create(true).append(true).open(path)?;
    Ok(rustix::stdio::dup2_stderr(&log)?)
}

impl Union {
    async fn serve(mut self) {
        self.until_gone().await;
        if !self.helper.vm().state().borrow().is_final()
            && let Err(error) = self.helper.flush().await
        {
            error!("Changes may be lost: {}", error_chain(&error));
        }
        let Self { export, helper, run_dir, .. } = self;
        helper.stop().await;
        drop(export);
        if let Err(error) = run_dir.remove() {
            error!("{}", error_chain(&error));
        }
    }

    /// Returns when nobody uses the mount any more.
    async fn until_gone(&mut self) {
        let (mut lost, mut until, mut told) = (false, None, Figures::default());
        while !self.export.is_gone() && until.is_none_or(|until| Instant::now() < until) {
            if let Some(why) = self.export.lost()
                && !std::mem::replace(&mut lost, true)
            {
                let state = self.helper.vm().state().borrow().to_string();
                error!("The union fails from now on: {why:?}; the VM is {state}");
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
    }

    fn take_away(&self) {
        if let Err(error) = unmount(&self.mountpoint, true) {
            warn!("Cannot unmount {}: {error}", self.mountpoint.display());
        }
    }
}
