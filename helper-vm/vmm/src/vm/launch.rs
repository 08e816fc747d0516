//! Starting QEMU: the sockets between it and this process, its command line, its jail.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::{io, process};

use tokio::net::UnixStream;
use tokio::process::Command;
use vmctr_proto::GuestCid;

use super::VmError;
use super::qemu_process::QemuProcess;
use crate::accel::Accelerator;
use crate::assets::GuestAssets;
use crate::binaries;
use crate::config::JailConfig;
use crate::console::{Console, Speaker};
use crate::guest_files::GuestFiles;
use crate::jail::{FIRST_FD, JailSpec, Limits, prefix_outside_usr};
use crate::qemu::Qemu;
use crate::qemu::command::{Engine, Purpose, QemuFds, arguments};
use crate::run_dir::RunDir;
use crate::spawn::spawn;
use crate::spec::VmSpec;
use crate::tsc::Reading;
use crate::vsock::VsockHost;

const JAIL: &str = "vmctr-jail";

/// What QEMU is started with.
pub(crate) struct Launch<'a> {
    pub spec: &'a VmSpec,
    pub qemu: &'a Qemu,
    pub accelerator: Accelerator,
    pub jail: &'a JailConfig,
    pub files: &'a GuestFiles,
    pub job: Job,
    /// vhost-user sockets.
    pub vsock: Option<OwnedFd>,
    pub share: Option<OwnedFd>,
}

/// What it is started for.
pub(crate) enum Job {
    /// Boots.
    Boot,
    /// Boots, and its state will be written here.
    Save(File),
    /// Goes on from this state.
    Restore(File),
}

/// A QEMU that was started, and this process's end of its monitor. Dropping it kills QEMU.
pub(crate) struct Launched {
    pub qemu: QemuProcess,
    pub pid: u32,
    pub qmp: UnixStream,
}

impl Launch<'_> {
    /// Starts QEMU in its jail. When this returns, QEMU may have failed already; its exit status tells.
    pub(crate) async fn start(mut self) -> Result<Launched, VmError> {
        let jail = binaries::find(JAIL)?;
        let mut passed = PassedFds::default();
        let (qmp, qmp_number) = passed.connected()?;
        let (console, console_number) = passed.connected()?;
        let fds = QemuFds {
            qmp: qmp_number,
            console: console_number,
            vsock: self.vsock.take().map(|vsock| passed.add(vsock)),
            share: self.share.take().map(|share| passed.add(share)),
        };
        let engine = self.engine(&mut passed).await?;
        let purpose = match std::mem::replace(&mut self.job, Job::Boot) {
            Job::Boot => Purpose::Boot,
            Job::Save(state) => Purpose::Template { state: passed.add(state) },
            Job::Restore(state) => Purpose::Restore { state: passed.add(state) },
        };
        let arguments = arguments(self.spec, engine, purpose, fds);
        let (qemu, pid) = self.spawn(&jail, arguments, passed, console).await?;
        Ok(Launched { qemu, pid, qmp })
    }

    async fn engine(&self, passed: &mut PassedFds) -> Result<Engine, VmError> {
        Ok(match (self.accelerator, &self.job) {
            (Accelerator::Kvm, _) => Engine::Kvm { device: passed.add(open_kvm()?) },
            // The guest knows it already.
            (Accelerator::Tcg, Job::Restore(_)) => Engine::Tcg { tsc_khz: 0 },
            (Accelerator::Tcg, _) => Engine::Tcg { tsc_khz: Reading::take().khz_until_now().await },
        })
    }

    async fn spawn(
        &self,
        jail: &Path,
        arguments: Vec<String>,
        passed: PassedFds,
        console: UnixStream,
    ) -> Result<(QemuProcess, u32), VmError> {
        let PassedFds(mut fds) = passed;
        let guest = self.files.mount().try_clone_to_owned().map_err(host("pass the guest's files on"))?;
        let spec = JailSpec {
            parent: process::id(),
            first_uid: self.jail.first_uid,
            program: self.qemu.path().to_owned(),
            prefix: prefix_outside_usr(self.qemu.path()),
            args: arguments,
            guest: guest.as_raw_fd(),
            guest_files: self.files.names(),
            fds: fds.iter().map(|fd| fd.as_raw_fd()).collect(),
            limits: Limits::for_vm(self.spec),
        };
        fds.push(guest);
        let spec =
            serde_json::to_string(&spec).map_err(io::Error::from).map_err(host("describe QEMU's jail"))?;
        let mut command = Command::new(jail);
        command.arg(spec).env_clear();
        let mut child = spawn(command, fds).await.map_err(host("start vmctr-jail"))?;
        let (Some(pid), Some(stderr)) = (child.id(), child.stderr.take()) else {
            return Err(host("watch vmctr-jail")(io::Error::other("it has no process ID or no stderr")));
        };
        let console = Console::forward(console, Speaker::Guest);
        let stderr = Console::forward(stderr, Speaker::Qemu);
        Ok((QemuProcess { child, console, stderr }, pid))
    }
}

/// Descriptors that QEMU inherits. Their order is the order of their numbers in QEMU.
#[derive(Default)]
struct PassedFds(Vec<OwnedFd>);

impl PassedFds {
    /// The number in QEMU.
    fn add(&mut self, fd: impl Into<OwnedFd>) -> i32 {
        self.0.push(fd.into());
        (FIRST_FD..).nth(self.0.len() - 1).unwrap_or(i32::MAX)
    }

    /// A stream whose other end QEMU gets, under the number.
    fn connected(&mut self) -> Result<(UnixStream, i32), VmError> {
        let pair = || {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((UnixStream::from_std(ours)?, theirs))
        };
        let (ours, theirs) = pair().map_err(host("make a socket pair"))?;
        Ok((ours, self.add(theirs)))
    }
}

/// Files for a VM that boots; with its RAM, if that is to be saved.
pub(crate) async fn boot_files(
    assets: &GuestAssets,
    spec: &VmSpec,
    with_ram: bool,
) -> Result<(GuestFiles, Option<File>), VmError> {
    let (kernel, initramfs, memory) = (assets.kernel(), assets.initramfs(), spec.memory());
    let made = tokio::task::spawn_blocking(move || {
        let mut files = GuestFiles::with_room_for(memory)?;
        files.copy_boot_files(&kernel, &initramfs)?;
        let ram = if with_ram { Some(files.add_ram(memory)?) } else { None };
        Ok((files, ram))
    });
    made.await
        .map_err(io::Error::other)
        .flatten()
        .map_err(host("copy the guest's kernel and initramfs to a tmpfs, which needs root"))
}

/// Files for a VM that is restored: its RAM, still empty.
pub(super) fn restore_files(spec: &VmSpec) -> Result<(GuestFiles, File), VmError> {
    let make = || {
        let mut files = GuestFiles::with_room_for(spec.memory())?;
        let ram = files.add_ram(spec.memory())?;
        Ok((files, ram))
    };
    make().map_err(host("make a tmpfs for the guest's memory, which needs root"))
}

/// The vsock device listens on a socket file only until QEMU's end is connected.
pub(super) fn serve_vsock(run_dir: &RunDir) -> Result<(VsockHost, OwnedFd), VmError> {
    let path = run_dir.path().join("vhost-vsock.sock");
    let connected = UnixListener::bind(&path).and_then(|listener| {
        let client = std::os::unix::net::UnixStream::connect(&path);
        fs::remove_file(&path)?;
        Ok((listener, client?))
    });
    let (listener, client) = connected.map_err(host("connect the vsock device"))?;
    let vsock = VsockHost::spawn(GuestCid::DEFAULT, listener)
        .map_err(io::Error::other)
        .map_err(host("start the vsock device"))?;
    Ok((vsock, client.into()))
}

fn open_kvm() -> Result<OwnedFd, VmError> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    kvm.map(OwnedFd::from).map_err(host("open /dev/kvm"))
}

pub(super) fn host(action: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { action, source }
}
