//! One VM in use by one container: the share daemon, QEMU, the agent, and the files that belong to them.
//!
//! ```text
//!   start   run directory -> locks -> work folder -> share daemon and VM -> MountShare -> event stream
//!   stop    the same backwards; a start that fails half-way does so too
//! ```
//!
//! Invariant: when either the VM or the share daemon ends, the other is ended too (the `EndSignal`), and
//! `stop` leaves no process and no file.

use std::io;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::timeout;
use tracing::{Instrument, error, info, warn};
use vmctr_fileshare::share::{Connection, Exit, LockError, Locks, ShareSpec};
use vmctr_proto::agent::{MountShareRequest, Stdio};
use vmctr_proto::{guest_paths::SHARE_TAG, ports};
use vmctr_vmm::accel::{self, AccelError};
use vmctr_vmm::assets::{AssetError, GuestAssets};
use vmctr_vmm::config::Config;
use vmctr_vmm::origin::{Machine, Origins};
use vmctr_vmm::qemu::{Qemu, QemuError};
use vmctr_vmm::run_dir::{Owner, Role, RunDir, RunDirError};
use vmctr_vmm::spec::{StartMode, VmSpec};
use vmctr_vmm::vm::{Origin, Vm, VmError, VmStart, VmState};
use vmctr_vmm::vsock::{UnixServer, VsockHost};

use super::agent::{AgentLink, CallError, EndSignal};
use super::claim::{self, RemoveOnDrop};
use super::guest_events::{self, GuestEvent};
use super::share_daemon::{ShareDaemon, ShareError};
use super::steps::{Step, Steps};
use super::warm::Warm;
use super::work_dir::{WorkDir, WorkDirError};
use crate::stdio::Streams;

const MOUNT_LIMIT: Duration = Duration::from_secs(30);
/// A restored VM that takes longer is given up for one that boots.
const RESTORE_LIMIT: Duration = Duration::from_secs(20);

const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// Between the end of the share daemon and that of the VM that caused it.
const CAUSE_GRACE: Duration = Duration::from_millis(500);

/// What a session is made of.
#[derive(Debug)]
pub struct SessionPlan {
    /// Whose it is.
    pub owner: Owner,
    /// The machine.
    pub vm: VmSpec,
    /// What it shares.
    pub share: ShareSpec,
    /// How the machine starts.
    pub start: StartMode,
    /// Work folder to make for the share's upper, when nobody else has.
    pub work_dir: Option<PathBuf>,
}

/// The session did not start.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Its run directory cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// A folder of its root is somebody else's.
    #[error(transparent)]
    Lock(LockError),
    /// Its root folder is.
    #[error(
        "{0}; containers that start from one folder each need the annotation io.vmctr.upper=guest or io.vmctr.upper-dir"
    )]
    Root(LockError),
    /// Its work folder cannot be used.
    #[error(transparent)]
    WorkDir(#[from] WorkDirError),
    /// The guest's kernel or initramfs cannot be used.
    #[error(transparent)]
    Assets(#[from] AssetError),
    /// QEMU cannot be used.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// No accelerator can be chosen.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// The host's folders cannot be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The VM does not start.
    #[error("Cannot start the VM")]
    Vm(#[from] VmError),
    /// The guest does not see the share.
    #[error(transparent)]
    Agent(#[from] CallError),
    /// A thread of ours is gone.
    #[error("Cannot look at the host's files")]
    Blocking(#[source] io::Error),
}

/// A VM in use.
#[derive(Debug)]
pub struct Session {
    vm: Vm,
    share: ShareDaemon,
    share_spec: ShareSpec,
    run_dir: RunDir,
    /// Held for its lock; removed with the session.
    work_dir: Option<WorkDir>,
    /// Of the root's folders, until nothing of the session works on them any more.
    locks: Locks,
    link: AgentLink,
    end: EndSignal,
    qemu: Qemu,
    guest_kernel: String,
    steps: Steps,
    last_stream: u64,
    watch: AbortHandle,
    /// Removes its socket file when dropped.
    _vsock_socket: Option<UnixServer>,
}

impl Session {
    /// Starts everything. On an error nothing is left.
    pub async fn start(
        config: &Config,
        plan: SessionPlan,
        warm: Option<Warm>,
    ) -> Result<(Self, mpsc::Receiver<GuestEvent>), SessionError> {
        let container_id = plan.owner.container_id.clone();
        let run_dir = claim::run_dir(config, &plan).await?;
        let guard = RemoveOnDrop::new(&run_dir);
        let session = Self::start_in(config, plan, run_dir, warm).await?;
        guard.disarm();
        let events = guest_events::spawn(session.vm.agent(), container_id, session.end.clone());
        Ok((session, events))
    }

    async fn start_in(
        config: &Config,
        plan: SessionPlan,
        run_dir: RunDir,
        warm: Option<Warm>,
    ) -> Result<Self, SessionError> {
        let mut steps = Steps::begin();
        let (locks, work_dir) = claim::folders(&plan).await?;
        let (assets, qemu) = find(config).await?;
        let resolution = accel::resolve(config, &assets, &qemu).await?;
        info!(accelerator = %resolution.accelerator, reason = resolution.reason, "Accelerator chosen");
        let guest_kernel = assets.manifest().kernel_release.clone();
        let machine = Machine { spec: plan.vm, assets, qemu, accelerator: resolution.accelerator };
        let origin = Origins::find(config, plan.start, machine.clone()).await;
        steps.end("prepare");

        let parts = Parts { config, machine: &machine, share: &plan.share, run_dir: &run_dir };
        let (vm, share, vsock_socket) = match fitting(warm, plan.start, &origin).await {
            Some(warm) => match parts.take(warm, &mut steps).await {
                Ok(taken) => taken,
                Err(error) => {
                    warn!("The pool's VM cannot be used: {}", crate::error::chain(&error));
                    parts.restore_or_boot(&origin, &mut steps).await?
                }
            },
            None => parts.restore_or_boot(&origin, &mut steps).await?,
        };
        let qemu = machine.qemu;

        let end = EndSignal::new();
        let link = AgentLink::new(vm.agent(), end.clone());
        let watch = watch(vm.clone(), share.clone(), end.clone());
        let mut session = Self {
            vm,
            share,
            share_spec: plan.share,
            run_dir,
            work_dir,
            locks,
            link,
            end,
            qemu,
            guest_kernel,
            steps,
            last_stream: 0,
            watch,
            _vsock_socket: vsock_socket,
        };
        if let Err(error) = session.mount_share().await {
            session.stop(&mut Steps::begin()).await;
            return Err(error.into());
        }
        session.steps.end("mount");
        Ok(session)
    }

    async fn mount_share(&self) -> Result<(), CallError> {
        let request = MountShareRequest { tag: SHARE_TAG.to_owned() };
        self.link
            .call("mount the share", MOUNT_LIMIT, |mut agent| async move { agent.mount_share(request).await })
            .await
            .map(drop)
    }

    /// Calls to the agent.
    pub fn agent(&self) -> &AgentLink {
        &self.link
    }

    /// Returns with the reason when the VM, the share daemon or the agent has ended.
    pub async fn ended(&self) -> String {
        self.end.wait().await
    }

    /// Dials the streams that a process needs: stdin, stdout, stderr.
    pub async fn open_streams(&mut self, wanted: [bool; 3], terminal: bool) -> io::Result<(Stdio, Streams)> {
        let mut stdio = Stdio { terminal, ..Stdio::default() };
        let mut streams = Streams::default();
        let slots = [
            (&mut stdio.stdin, &mut streams.stdin),
            (&mut stdio.stdout, &mut streams.stdout),
            (&mut stdio.stderr, &mut streams.stderr),
        ];
        for ((number, stream), wanted) in slots.into_iter().zip(wanted) {
            if wanted {
                self.last_stream += 1;
                *number = self.last_stream;
                let dialled = timeout(DIAL_LIMIT, dial(self.vm.vsock(), self.last_stream)).await;
                *stream = Some(dialled.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??);
            }
        }
        Ok((stdio, streams))
    }

    /// QEMU's process ID.
    pub fn pid(&self) -> u32 {
        self.vm.qemu_pid()
    }

    /// The share daemon's process ID.
    pub fn share_pid(&self) -> u32 {
        self.share.pid()
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// What is shared.
    pub fn share_spec(&self) -> &ShareSpec {
        &self.share_spec
    }

    /// Where its files are.
    pub fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    /// The program that runs the VM.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// Release of the guest's kernel.
    pub fn guest_kernel(&self) -> &str {
        &self.guest_kernel
    }

    /// The parts of the start, in order.
    pub fn steps(&self) -> &Steps {
        &self.steps
    }

    /// Ends the VM and the share daemon and removes their files; what that took is added to `steps`. What fails
    /// is logged: there is nobody left who could do better.
    pub async fn stop(self, steps: &mut Steps) {
        self.watch.abort();
        self.end.set("The container was deleted".to_owned());
        if let Err(error) = self.vm.stop().await {
            error!("Cannot stop the VM: {}", crate::error::chain(&error));
        }
        steps.end("vm");
        let Self { share, run_dir, work_dir, locks, .. } = self;
        let stopped = spawn_blocking(move || {
            let mut steps = Steps::begin();
            if let Err(error) = share.stop() {
                error!("Cannot stop the share daemon: {error}");
            }
            steps.end("share");
            drop((work_dir, locks));
            let removed = run_dir.remove();
            steps.end("files");
            (steps, removed)
        });
        if let Ok((stopped, removed)) = stopped.await {
            steps.add(stopped.done().iter().copied());
            if let Err(error) = removed {
                error!("{}", crate::error::chain(&error));
            }
        }
    }
}

/// What the two processes of a session are made of.
struct Parts<'a> {
    config: &'a Config,
    machine: &'a Machine,
    share: &'a ShareSpec,
    run_dir: &'a RunDir,
}

/// A VM in use, its share daemon, and the socket of its vsock where the VM itself does not keep that.
type Started = (Vm, ShareDaemon, Option<UnixServer>);

impl Parts<'_> {
    /// From the template if there is one that works.
    async fn restore_or_boot(&self, origin: &Origins, steps: &mut Steps) -> Result<Started, SessionError> {
        let (vm, share) = match self.start(origin.first(), steps).await {
            Err(SessionError::Vm(error)) if origin.is_template() => {
                origin.discard(&error).await;
                self.start(origin.boot(), steps).await?
            }
            started => started?,
        };
        origin.make_template_later();
        Ok((vm, share, None))
    }

    /// The share daemon and QEMU start side by side; QEMU waits for the daemon where it needs it.
    async fn start(&self, origin: Origin, steps: &mut Steps) -> Result<(Vm, ShareDaemon), SessionError> {
        let mut connection = Connection::new(self.run_dir.path()).map_err(ShareError::from)?;
        let limit = self.config.vm.boot_timeout_seconds.duration();
        let boot_timeout = match origin {
            Origin::Boot(_) => limit,
            Origin::Template(_) => limit.min(RESTORE_LIMIT),
        };
        let start = VmStart {
            spec: self.machine.spec,
            origin,
            qemu: self.machine.qemu.clone(),
            accelerator: self.machine.accelerator,
            run_dir: self.run_dir.clone(),
            jail: self.config.jail.clone(),
            share: connection.socket.take(),
            share_later: false,
            boot_timeout,
        };
        let mut starting = pin!(Vm::start(start));
        let mut serving = pin!(self.serve(connection));
        let (vm, share) = tokio::select! {
            share = &mut serving => {
                let share = share?;
                (while_shared(starting.as_mut(), &share).await?, share)
            }
            vm = &mut starting => (vm?, serving.await?),
        };
        let phases = vm.phases().iter();
        steps.add(phases.map(|phase| Step { name: phase.phase.as_str(), duration: phase.duration }));
        Ok((vm, share))
    }

    /// A VM of the pool becomes this container's.
    async fn take(&self, warm: Warm, steps: &mut Steps) -> Result<Started, SessionError> {
        let (vm, connection, remains) = warm.split();
        let taken = async {
            self.run_dir.record(Role::Qemu, vm.qemu_pid())?;
            let (share, resumed) = tokio::join!(self.serve(connection), vm.resume());
            let share = share?;
            resumed?;
            steps.end("take");
            vm.plug_share().await?;
            let socket = vm.vsock().serve_unix(&self.run_dir.vsock_socket());
            let socket = socket.map_err(ShareError::Watch)?;
            steps.end("plug");
            Ok((share, socket))
        };
        let taken: Result<_, SessionError> = taken.await;
        drop(remains);
        match taken {
            Ok((share, socket)) => Ok((vm, share, Some(socket))),
            Err(error) => {
                if let Err(error) = vm.stop().await {
                    error!("Cannot stop the VM: {}", crate::error::chain(&error));
                }
                Err(error)
            }
        }
    }

    async fn serve(&self, connection: Connection) -> Result<ShareDaemon, SessionError> {
        let level = self.config.log.level.as_str();
        let share = ShareDaemon::start(self.share.clone(), connection, level).await?;
        self.run_dir.record(Role::Fsd, share.pid())?;
        Ok(share)
    }
}

/// The pool's VM, if it is what the container wants; else it ends.
async fn fitting(warm: Option<Warm>, start: StartMode, origin: &Origins) -> Option<Warm> {
    let warm = warm?;
    if start == StartMode::Pool && origin.key() == Some(warm.key()) {
        return Some(warm);
    }
    info!("The container wants another VM than the pool's");
    warm.discard().await;
    None
}

/// Waits for the VM while the share daemon lives. QEMU's end also ends the daemon, which is the faster one to be
/// seen: the VM's own reason is then the true one.
async fn while_shared(
    mut starting: Pin<&mut impl Future<Output = Result<Vm, VmError>>>,
    share: &ShareDaemon,
) -> Result<Vm, SessionError> {
    let exit = tokio::select! {
        vm = &mut starting => return Ok(vm?),
        exit = share.ended() => exit,
    };
    match timeout(CAUSE_GRACE, starting).await {
        Ok(Err(error)) => Err(error.into()),
        _ => Err(CallError::Ended(share_ended(exit)).into()),
    }
}

/// Turns the end of the VM or of the share daemon into the session's.
fn watch(vm: Vm, share: ShareDaemon, end: EndSignal) -> AbortHandle {
    let watch = async move {
        let reason = tokio::select! {
            state = vm.ended() => vm_ended(state),
            exit = share.ended() => {
                // QEMU's end also ends the daemon, which is the faster one to be seen.
                let cause = timeout(CAUSE_GRACE, vm.ended()).await;
                cause.map_or_else(|_| share_ended(exit), vm_ended)
            }
        };
        end.set(reason);
    };
    tokio::spawn(watch.in_current_span()).abort_handle()
}

fn vm_ended(state: VmState) -> String {
    match state {
        VmState::Failed(reason) => reason,
        other => format!("The VM is {other}"),
    }
}

fn share_ended(exit: Exit) -> String {
    format!("The share daemon ended ({exit})")
}

async fn find(config: &Config) -> Result<(GuestAssets, Qemu), SessionError> {
    let config = config.clone();
    let found = spawn_blocking(move || Ok((GuestAssets::find(&config)?, Qemu::find_known(&config)?)));
    found.await.map_err(|error| SessionError::Blocking(error.into()))?
}

async fn dial(vsock: &VsockHost, number: u64) -> io::Result<std::os::unix::net::UnixStream> {
    let mut stream = vsock.connect(ports::STDIO).await.map_err(io::Error::other)?;
    stream.write_all(&number.to_le_bytes()).await?;
    stream.into_std()
}
