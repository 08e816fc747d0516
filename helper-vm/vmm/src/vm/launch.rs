//! Starting QEMU: the sockets between it and this process, its command line, its jail.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::{io, process};

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
use crate::qemu::command::{QemuFds, arguments};
use crate::run_dir::RunDir;
use crate::spawn::spawn;
use crate::vsock::{Listener, VsockHost};

const JAIL: &str = "vmctr-jail";

/// A QEMU that was started, and this process's ends of its connections. Dropping it kills QEMU.
pub(super) struct Launched {
    pub qemu: QemuProcess,
    pub pid: u32,
    pub qmp: tokio::net::UnixStream,
    pub vsock: VsockHost,
    /// Takes the agent's one connect; in place before the guest can make it.
    pub ready: Listener,
    /// QEMU reads them until the guest has booted.
    pub guest_files: GuestFiles,
}

/// QEMU's ends of its connections. Their order is the order of their numbers in QEMU.
struct QemuEnds {
    fds: Vec<OwnedFd>,
    numbers: QemuFds,
}

pub(super) async fn launch(start: &mut VmStart) -> Result<Launched, VmError> {
    let jail = binaries::find(JAIL)?;
    let (qmp, qemu_qmp) = socketpair()?;
    let (console, qemu_console) = socketpair()?;
    let (vsock, qemu_vsock) = serve_vsock(&start.run_dir)?;
    let ready = vsock.listen(ports::READY).map_err(io::Error::other).map_err(host("listen for the guest"))?;
    let kvm = match start.accelerator {
        Accelerator::Kvm => Some(open_kvm()?),
        Accelerator::Tcg => None,
    };
    let guest_files = copy_guest_files(&start.assets).await?;
    let guest = guest_files.mount().try_clone_to_owned().map_err(host("pass the guest's files on"))?;
    let mut ends =
        QemuEnds::new(qemu_qmp.into(), qemu_console.into(), qemu_vsock.into(), start.share.take(), kvm);
    let mut command = Command::new(jail);
    command.arg(jail_argument(start, &ends, guest.as_raw_fd())?).env_clear();
    ends.fds.push(guest);
    let mut child = spawn(command, ends.fds).await.map_err(host("start vmctr-jail"))?;
    let gone = || host("learn QEMU's process ID")(io::Error::other("it is gone already"));
    let pid = child.id().ok_or_else(gone)?;
    let stderr =
        child.stderr.take().ok_or_else(|| host("read QEMU's stderr")(io::Error::other("no pipe")))?;
    let console = Console::forward(tokio_stream(console)?, Speaker::Guest);
    let stderr = Console::forward(stderr, Speaker::Qemu);
    Ok(Launched {
        qemu: QemuProcess { child, console, stderr },
        pid,
        qmp: tokio_stream(qmp)?,
        vsock,
        ready,
        guest_files,
    })
}

impl QemuEnds {
    fn new(
        qmp: OwnedFd,
        console: OwnedFd,
        vsock: OwnedFd,
        share: Option<OwnedFd>,
        kvm: Option<OwnedFd>,
    ) -> Self {
        let mut fds = vec![];
        let mut number = |fd: OwnedFd| {
            let number = FIRST_FD + fds.len() as i32;
            fds.push(fd);
            number
        };
        let numbers = QemuFds {
            qmp: number(qmp),
            console: number(console),
            vsock: number(vsock),
            share: share.map(&mut number),
            kvm: kvm.map(&mut number),
        };
        Self { fds, numbers }
    }
}

/// The jail's description. The numbers are those of descriptors in this process, which the jail inherits.
fn jail_argument(start: &VmStart, ends: &QemuEnds, guest: RawFd) -> Result<String, VmError> {
    let spec = JailSpec {
        parent: process::id(),
        first_uid: start.jail.first_uid,
        program: start.qemu.path().to_owned(),
        prefix: prefix_outside_usr(start.qemu.path()),
        args: arguments(&start.spec, start.accelerator, ends.numbers),
        guest,
        fds: ends.fds.iter().map(|fd| fd.as_raw_fd()).collect(),
        limits: Limits::for_vm(&start.spec),
    };
    serde_json::to_string(&spec).map_err(io::Error::from).map_err(host("describe QEMU's jail"))
}

async fn copy_guest_files(assets: &GuestAssets) -> Result<GuestFiles, VmError> {
    let (kernel, initramfs) = (assets.kernel(), assets.initramfs());
    let copied = tokio::task::spawn_blocking(move || GuestFiles::copy([&kernel, &initramfs])).await;
    copied.map_err(io::Error::other).flatten().map_err(host("copy the guest's kernel and initramfs"))
}

/// The vsock device listens on a socket file only until QEMU's end is connected.
fn serve_vsock(run_dir: &RunDir) -> Result<(VsockHost, UnixStream), VmError> {
    let path = run_dir.path().join("vhost-vsock.sock");
    let connected = UnixListener::bind(&path).and_then(|listener| {
        let client = UnixStream::connect(&path);
        fs::remove_file(&path)?;
        Ok((listener, client?))
    });
    let (listener, client) = connected.map_err(host("connect the vsock device"))?;
    let vsock = VsockHost::spawn(GuestCid::DEFAULT, listener)
        .map_err(io::Error::other)
        .map_err(host("start the vsock device"))?;
    Ok((vsock, client))
}

fn open_kvm() -> Result<OwnedFd, VmError> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    kvm.map(OwnedFd::from).map_err(host("open /dev/kvm"))
}

fn socketpair() -> Result<(UnixStream, UnixStream), VmError> {
    UnixStream::pair().map_err(host("make a socket pair"))
}

fn tokio_stream(stream: UnixStream) -> Result<tokio::net::UnixStream, VmError> {
    stream
        .set_nonblocking(true)
        .and_then(|()| tokio::net::UnixStream::from_std(stream))
        .map_err(host("use a socket pair"))
}

fn host(action: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { action, source }
}
