//! The helper VM of a union: the share daemon, QEMU, the agent.
//!
//! Invariant: when the share daemon ends, the VM is ended too, so that nobody waits for files that do not come.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read};
use std::process::ChildStderr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::task::{JoinError, spawn_blocking};
use tokio::time::timeout;
use tonic::Status;
use tracing::{error, info, warn};
use vmctr_fileshare::export::wire::stream::Stream;
use vmctr_fileshare::share::{Fsd, ShareSpec, SpawnError, spawn};
use vmctr_proto::agent::{Empty, ExportRequest, HostUpper, MountShareRequest, Overlay, overlay};
use vmctr_proto::{guest_paths, ports};
use vmctr_vmm::accel::{self, AccelError};
use vmctr_vmm::assets::{AssetError, GuestAssets};
use vmctr_vmm::binaries::{self, BinaryError};
use vmctr_vmm::config::Config;
use vmctr_vmm::origin::{Machine, Origins};
use vmctr_vmm::qemu::{Qemu, QemuError};
use vmctr_vmm::run_dir::{Role, RunDir, RunDirError};
use vmctr_vmm::spec::{Host, Limits, SpecError, VmSpec};
use vmctr_vmm::vm::{Origin, Vm, VmError, VmStart};
use vmctr_vmm::{LogRate, error_chain};

use super::check::Plan;

const DAEMON: &str = "vmctr-fsd";

/// A restored VM that takes longer is given up for one that boots.
const RESTORE_LIMIT: Duration = Duration::from_secs(20);
const MOUNT_LIMIT: Duration = Duration::from_secs(60);
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// Writing a guest's dirty pages back to the host.
const FLUSH_LIMIT: Duration = Duration::from_secs(300);

/// A log line of the daemon is cut here: it works on what a hostile guest sends.
const LINE_LIMIT: u64 = 2048;
/// Of what the guest says, this much is passed on.
const MAX_TEXT: usize = 1024;

/// A VM with the union's folders.
#[derive(Debug)]
pub struct Helper {
    vm: Vm,
    fsd: Arc<Fsd>,
}

/// The VM does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The configuration's VM cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The guest's kernel or initramfs cannot be used.
    #[error(transparent)]
    Assets(#[from] AssetError),
    /// QEMU cannot be used.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// No accelerator can be chosen.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// The share daemon is not installed.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// The host's folders cannot be shared.
    #[error(transparent)]
    Share(#[from] SpawnError),
    /// Its processes cannot be recorded.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The VM does not start.
    #[error("Cannot start the VM")]
    Vm(#[from] VmError),
    /// A thread of ours is gone.
    #[error("A thread that starts the VM is gone")]
    Thread(#[from] JoinError),
    /// The daemon's log cannot be read.
    #[error("Cannot read the share daemon's log")]
    Log(#[source] io::Error),
    /// The agent refused or failed.
    #[error("The guest did not {what}: {text}")]
    Refused {
        /// The call, as a verb.
        what: &'static str,
        /// The guest's words, cleaned.
        text: String,
    },
    /// The agent did not answer.
    #[error("The guest did not {what} within {} s", limit.as_secs())]
    Timeout {
        /// The call, as a verb.
        what: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// No stream to the guest.
    #[error("Cannot open a stream to the guest")]
    Stream(#[source] io::Error),
}

impl Helper {
    /// Starts the VM and lets it mount the share. On an error nothing is left.
    pub async fn start(config: &Config, share: ShareSpec, run_dir: &RunDir) -> Result<Self, HelperError> {
        let spec = VmSpec::resolve(&config.vm, &Limits::default(), &HashMap::new(), &Host::detect())?;
        let found = config.clone();
        let found = spawn_blocking(move || {
            Ok::<_, HelperError>((GuestAssets::find(&found)?, Qemu::find_known(&found)?))
        });
        let (assets, qemu) = found.await??;
        let accelerator = accel::resolve(config, &assets, &qemu).await?.accelerator;
        let machine = Machine { spec, assets, qemu, accelerator };
        let origins = Origins::find(config, config.vm.start, machine.clone()).await;
        let launch = Launch { config, machine: &machine, share: &share, run_dir };
        let helper = match launch.start(origins.first()).await {
            Err(HelperError::Vm(error)) if origins.is_template() => {
                origins.discard(&error).await;
                launch.start(origins.boot()).await?
            }
            started => started?,
        };
        origins.make_template_later();
        helper.mount_share().await?;
        Ok(helper)
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    async fn mount_share(&self) -> Result<(), HelperError> {
        let request = MountShareRequest { tag: guest_paths::SHARE_TAG.to_owned() };
        let mut agent = self.vm.agent();
        call("mount the share", MOUNT_LIMIT, agent.mount_share(request)).await
    }

    /// Has the guest make the union and serve it under this number.
    pub async fn export(&self, plan: &Plan, export: u32) -> Result<(), HelperError> {
        let request = ExportRequest { export, overlay: Some(guest_overlay(plan)) };
        let mut agent = self.vm.agent();
        call("make the union", MOUNT_LIMIT, agent.export(request)).await
    }

    /// A stream to the guest's exports.
    pub async fn dial(&self) -> Result<Stream, HelperError> {
        let dialled = timeout(DIAL_LIMIT, self.vm.vsock().connect(ports::EXPORT)).await;
        let late = || HelperError::Stream(io::ErrorKind::TimedOut.into());
        let stream =
            dialled.map_err(|_| late())?.map_err(|error| HelperError::Stream(io::Error::other(error)))?;
        Ok(Stream::from(stream.into_std().map_err(HelperError::Stream)?))
    }

    /// Brings all that the guest has to the host's disks.
    pub async fn flush(&self) -> Result<(), HelperError> {
        let mut agent = self.vm.agent();
        call("write its changes to disk", FLUSH_LIMIT, agent.flush(Empty {})).await
    }

    /// Ends VM and daemon. What fails is logged: nobody is left who could do better.
    pub async fn stop(self) {
        if let Err(error) = self.vm.stop().await {
            error!("Cannot stop the VM: {}", error_chain(&error));
        }
        if let Err(error) = self.fsd.kill() {
            error!("Cannot stop the share daemon: {error}");
        }
    }
}

struct Launch<'a> {
    config: &'a Config,
    machine: &'a Machine,
    share: &'a ShareSpec,
    run_dir: &'a RunDir,
}

impl Launch<'_> {
    async fn start(&self, origin: Origin) -> Result<Helper, HelperError> {
        let mut fsd = self.serve().await?;
        self.run_dir.record(Role::Fsd, fsd.pid())?;
        if let Some(stderr) = fsd.stderr.take() {
            forward_log(stderr).map_err(HelperError::Log)?;
        }
        let vm = Vm::start(self.vm(origin, &mut fsd)).await?;
        let fsd = Arc::new(fsd);
        tokio::spawn(end_together(Arc::clone(&fsd), vm.clone()));
        Ok(Helper { vm, fsd })
    }

    async fn serve(&self) -> Result<Fsd, HelperError> {
        let (share, dir) = (self.share.clone(), self.run_dir.path().to_owned());
        let level = self.config.log.level.as_str();
        // virtiofsd's debug lines tell of every single request.
        let level = if level == "debug" { "debug,virtiofsd=info" } else { level };
        let started = spawn_blocking(move || {
            let binary = binaries::find(DAEMON)?;
            Ok::<_, HelperError>(spawn(&binary, &share, &dir, level)?)
        });
        started.await?
    }

    fn vm(&self, origin: Origin, fsd: &mut Fsd) -> VmStart {
        let limit = self.config.vm.boot_timeout_seconds.duration();
        let boot_timeout = match origin {
            Origin::Boot(_) => limit,
            Origin::Template(_) => limit.min(RESTORE_LIMIT),
        };
        VmStart {
            spec: self.machine.spec,
            origin,
            qemu: self.machine.qemu.clone(),
            accelerator: self.machine.accelerator,
            run_dir: self.run_dir.clone(),
            jail: self.config.jail.clone(),
            share: fsd.socket.take(),
            share_later: false,
            boot_timeout,
        }
    }
}

async fn end_together(fsd: Arc<Fsd>, vm: Vm) {
    let ended = spawn_blocking(move || fsd.wait()).await;
    info!(
        "The share daemon ended ({})",
        ended.map_or_else(|error| error.to_string(), |exit| exit.to_string())
    );
    if let Err(error) = vm.stop().await {
        error!("Cannot stop the VM: {}", error_chain(&error));
    }
}

async fn call<T>(
    what: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<(), HelperError> {
    match timeout(limit, call).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(HelperError::Refused { what, text: clean(status.message()) }),
        Err(_) => Err(HelperError::Timeout { what, limit }),
    }
}

/// Text of the guest's, fit for logs and terminals.
fn clean(text: &str) -> String {
    text.chars().take(MAX_TEXT).map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

fn guest_overlay(plan: &Plan) -> Overlay {
    let host = || HostUpper { upper: guest_paths::UPPER.into(), work: guest_paths::WORK.into() };
    Overlay {
        lowers: (0..plan.lowers.len()).map(guest_paths::lower).collect(),
        upper: plan.top.as_ref().map(|_| overlay::Upper::Host(host())),
    }
}

/// Reads on whatever comes, so that the daemon never waits; what is too much is dropped.
fn forward_log(stderr: ChildStderr) -> io::Result<()> {
    let forward = move || {
        let mut lines = BufReader::new(stderr);
        let mut rate = LogRate::new(Instant::now());
        let mut line = Vec::new();
        // The end of the stream is the end of the daemon, which is watched elsewhere.
        while let Ok(1..) = (&mut lines).take(LINE_LIMIT).read_until(b'\n', &mut line) {
            if rate.admit(Instant::now()).is_some() {
                log_line(String::from_utf8_lossy(&line).trim());
            }
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
