//! The background process of mounts: the owner of a VM and its unions, or the mount of a container's root.
//!
//! ```text
//!   order (stdin) ─┬ union: see `owner`
//!                  └ container: run directory, log ─ its shim, its guest ─ streams ─ mount ─ "ready" (stdout)
//!                                                                                      │
//!                               run directory removed ─ streams close <─ umount(2), or SIGTERM: taken away lazily
//! ```
//!
//! Invariant: it lives as long as a mount of its is in use.

use std::fs::File;
use std::io;
use std::time::Duration;

use anyhow::Context as _;
use rustix::mount::MountAttrFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, setsid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tracing::{info, warn};
use vmctr_fileshare::export::host::{Cache, Config as MountConfig, Export, Streams};
use vmctr_fileshare::share::Locks;
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::RunDir;

use super::mount::answer;
use super::order::{Answer, Order};
use super::served::Served;
use super::target::Target;
use super::{owner, record};
use crate::failure::{Outcome, Verdict, one_line};

/// Relay threads of a mount: more of them let more processes wait for the guest at the same time.
pub const LANES: usize = 4;

/// How long what a container shows may be remembered.
const MEMORY: Duration = Duration::from_secs(1);

/// Mounts what standard input says, and serves it until it is unmounted.
pub async fn run(config: &Config) -> Outcome {
    // It is a session's leader already where the parent made it one.
    let _ = setsid();
    raise_file_limit();
    let order = serde_json::from_reader(io::stdin()).context("Cannot read what to mount");
    let served = match order {
        Ok(Order::Union(plan)) => owner::run(config, plan).await,
        Ok(Order::Container(target)) => serve_container(config, target).await,
        Err(error) => Err(error),
    };
    match served {
        Ok(()) => Ok(Verdict::Good),
        Err(error) => {
            answer(&Answer::Failed(one_line(&error)))?;
            Ok(Verdict::Bad)
        }
    }
}

/// Lower folders, files that are lent and relay threads want many more files than programs that use select(2) can have,
/// for which the usual limit is made. Where it cannot be raised, who wants more is told.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// An error says why there is no mount.
async fn serve_container(config: &Config, target: Target) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let end = watch::Sender::new(false);
    let ended = end.subscribe();
    tokio::spawn(async move {
        terminate.recv().await;
        end.send_replace(true);
        // What it tells is to be seen as long as anybody looks.
        end.closed().await;
    });
    let served = start(config, target).await?;
    if answer(&Answer::Ready).is_err() {
        warn!("Nobody waits for the mount any more");
        served.take_away();
    }
    served.until_gone(ended, || "the container or its VM has ended".to_owned()).await;
    served.finish(false);
    Ok(())
}

async fn start(config: &Config, target: Target) -> anyhow::Result<Served> {
    let order = Order::Container(target.clone());
    let (place, mountpoint) = (config.run_dir.clone(), target.mountpoint.clone());
    let run_dir = spawn_blocking(move || record::claim(&place, &mountpoint)).await??;
    match start_in(&order, &target, &run_dir).await {
        Ok(export) => {
            if let Err(error) = record::write_device(run_dir.path(), &target.mountpoint) {
                warn!("Cannot write down which mount it is: {error}");
            }
            info!("Mounted");
            Ok(Served::new(export, run_dir, target.mountpoint, Locks::default()))
        }
        Err(error) => {
            // The first error is the one to tell.
            let _ = run_dir.remove();
            Err(error)
        }
    }
}

async fn start_in(order: &Order, target: &Target, run_dir: &RunDir) -> anyhow::Result<Export> {
    let log = File::options().create(true).append(true).open(record::log(run_dir.path()));
    let log = log.context("Cannot write the log")?;
    rustix::stdio::dup2_stderr(&log)?;
    record::write(run_dir.path(), order).context("Cannot write down what is mounted")?;
    mount_container(target).await
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
