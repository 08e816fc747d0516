//! Starting QEMU: the sockets between it and this process, its command line, its jail.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::{io, process};

use tokio::net::UnixStream;
use tokio::process::Command;
use vmctr_proto::{GuestCid, ports};

use super::qemu_process::QemuProcess;
use super::{VmError, VmStart};
use crate::accel::Accelerator;
use crate::assets::GuestAssets;
use crate::binaries;
use crate::console::{Console, Speaker};
use crate::guest_files::GuestFiles;
use crate::jail::{FIRST_FD, JailSpec, Limits, prefix_outside_usr};
use crate::qemu::command::{Engine, QemuFds, arguments};
use crate::run_dir::RunDir;
use crate::spawn::spawn;
use crate::tsc::Reading;
use crate::vsock::{Listener, VsockHost};

const JAIL: &str = "vmctr-jail";

/// A QEMU that was started, and this process's ends of its connections. Dropping it kills QEMU.
pub(super) struct Launched {
    pub qemu: QemuProcess,
    pub pid: u32,
    pub qmp: UnixStream,
    pub vsock: VsockHost,
    /// Takes the agent's one connect; in place before the guest can make it.
    pub ready: Listener,
    /// QEMU reads them until the guest has booted.
    pub guest_files: GuestFiles,
}

/// Starts QEMU in its jail. When this returns, QEMU may have failed already; its exit status tells.
pub(super) async fn launch(start: &mut VmStart) -> Result<Launched, VmError> {
    let jail = binaries::find(JAIL)?;
    let tsc = Reading::take();
    let guest_files = copy_guest_files(&start.assets).await?;

    let mut passed = PassedFds::default();
    let (qmp, qmp_number) = passed.connected()?;
    let (console, console_number) = passed.connected()?;
    let (vsock, qemu_vsock) = serve_vsock(&start.run_dir)?;
    let ready = vsock.listen(ports::READY).map_err(io::Error::other).map_err(host("listen for the guest"))?;
    let fds = QemuFds {
        qmp: qmp_number,
        console: console_number,
        vsock: passed.add(qemu_vsock),
        share: start.share.take().map(|share| passed.add(share)),
    };
    let engine = match start.accelerator {
        Accelerator::Kvm => Engine::Kvm { device: passed.add(open_kvm()?) },
        Accelerator::Tcg => Engine::Tcg { tsc_khz: tsc.khz_until_now().await },
    };
    let arguments = arguments(&start.spec, engine, fds);
    let (qemu, pid) = spawn_jailed(&jail, start, arguments, passed, &guest_files, console).await?;
    Ok(Launched { qemu, pid, qmp, vsock, ready, guest_files })
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

async fn spawn_jailed(
    jail: &Path,
    start: &VmStart,
    arguments: Vec<String>,
    passed: PassedFds,
    guest_files: &GuestFiles,
    console: UnixStream,
) -> Result<(QemuProcess, u32), VmError> {
    let PassedFds(mut fds) = passed;
    let guest = guest_files.mount().try_clone_to_owned().map_err(host("pass the guest's files on"))?;
    let spec = JailSpec {
        parent: process::id(),
        first_uid: start.jail.first_uid,
        program: start.qemu.path().to_owned(),
        prefix: prefix_outside_usr(start.qemu.path()),
        args: arguments,
        guest: guest.as_raw_fd(),
        fds: fds.iter().map(|fd| fd.as_raw_fd()).collect(),
        limits: Limits::for_vm(&start.spec),
    };
    fds.push(guest);
    let spec = serde_json::to_string(&spec).map_err(io::Error::from).map_err(host("describe QEMU's jail"))?;
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

async fn copy_guest_files(assets: &GuestAssets) -> Result<GuestFiles, VmError> {
    let (kernel, initramfs) = (assets.kernel(), assets.initramfs());
    let copied = tokio::task::spawn_blocking(move || GuestFiles::copy([&kernel, &initramfs])).await;
    copied
        .map_err(io::Error::other)
        .flatten()
        .map_err(host("copy the guest's kernel and initramfs to a tmpfs, which needs root"))
}

/// The vsock device listens on a socket file only until QEMU's end is connected.
fn serve_vsock(run_dir: &RunDir) -> Result<(VsockHost, OwnedFd), VmError> {
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

fn host(action: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { action, source }
}
