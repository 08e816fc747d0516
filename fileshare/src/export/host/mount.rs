//! The mount itself: made apart, given a connection, and only then put in its place.
//!
//! ```text
//!   /dev/fuse ─ fsopen, fsconfig ─> superblock ─ INIT ─> ready ─ move_mount ─> mountpoint
//!                                        └ fusectl: a handle that cuts the connection, wherever the mount went
//! ```

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::config::Config;
use super::device::Device;
use super::pipe::MAX_READ;
use crate::folder;

/// A mount that is not in its place yet.
#[derive(Debug)]
pub(super) struct Apart {
    pub(super) device: Device,
    pub(super) cut: Cut,
    mount: OwnedFd,
    id: MountId,
}

/// Cuts the connection between a mount and whoever serves it.
#[derive(Debug)]
pub(super) struct Cut(OwnedFd);

/// The mount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no device to serve it by.
    #[error("Cannot open /dev/fuse; does the kernel have FUSE?")]
    Device(#[source] io::Error),
    /// The kernel refuses.
    #[error("Cannot make a FUSE mount ({0}); it takes CAP_SYS_ADMIN")]
    Make(&'static str, #[source] io::Error),
    /// The kernel's control of FUSE connections is missing.
    #[error("Cannot open the control file of the FUSE connection")]
    Control(#[source] io::Error),
    /// It cannot be put there.
    #[error("Cannot mount on {0}")]
    Place(PathBuf, #[source] io::Error),
}

impl Apart {
    pub(super) fn make(config: &Config) -> Result<Self, MountError> {
        let device = Device::open().map_err(MountError::Device)?;
        let failed = |step| move |errno: rustix::io::Errno| MountError::Make(step, errno.into());
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
        for (key, value) in [
            ("source", config.source.clone()),
            ("subtype", "vmctr".to_owned()),
            ("fd", device.0.as_raw_fd().to_string()),
            ("rootmode", "40000".to_owned()),
            ("user_id", rustix::process::getuid().as_raw().to_string()),
            ("group_id", rustix::process::getgid().as_raw().to_string()),
            ("max_read", MAX_READ.to_string()),
        ] {
            fsconfig_set_string(&context, key, value).map_err(failed(key))?;
        }
        fsconfig_set_flag(&context, "default_permissions").map_err(failed("default_permissions"))?;
        if config.allow_other {
            fsconfig_set_flag(&context, "allow_other").map_err(failed("allow_other"))?;
        }
        if config.restrictions.contains(MountAttrFlags::MOUNT_ATTR_RDONLY) {
            fsconfig_set_flag(&context, "ro").map_err(failed("ro"))?;
        }
        fsconfig_create(&context).map_err(failed("create"))?;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, config.restrictions)
            .map_err(failed("fsmount"))?;
        let id = MountId::of(&mount).map_err(failed("statx"))?;
        Ok(Self { device, cut: Cut::find(id.minor)?, mount, id })
    }

    /// Puts the mount in its place.
    pub(super) fn place(self, config: &Config) -> Result<(Device, Cut, MountPlace), MountError> {
        read_ahead(self.id.minor);
        let path = config.mountpoint.clone();
        let placed = |error| MountError::Place(config.mountpoint.clone(), error);
        let target = folder::open(&path, OFlags::PATH).map_err(placed)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.mount, c"", &target, c"", flags).map_err(|errno| placed(errno.into()))?;
        Ok((self.device, self.cut, MountPlace { path, id: self.id }))
    }
}

/// What tells a mount from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MountId {
    mount: u64,
    major: u32,
    /// A FUSE mount's device has major 0; its minor names the connection.
    minor: u32,
}

impl MountId {
    /// Asked without a request to the guest, which nobody would answer before the mount is served, or after.
    fn of(root: &OwnedFd) -> rustix::io::Result<Self> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let st = rustix::fs::statx(root, c"", flags, StatxFlags::MNT_ID)?;
        Ok(Self { mount: st.stx_mnt_id, major: st.stx_dev_major, minor: st.stx_dev_minor })
    }
}

/// Where a mount was put, and which one it is.
#[derive(Debug)]
pub(super) struct MountPlace {
    path: PathBuf,
    id: MountId,
}

impl MountPlace {
    /// Unmounts what is there if it is this mount: another one that was put there later is somebody else's.
    pub(super) fn take_away(&self) -> io::Result<bool> {
        let there = folder::open(&self.path, OFlags::PATH)?;
        if MountId::of(&there)? != self.id {
            return Ok(false);
        }
        let itself = format!("/proc/self/fd/{}", there.as_raw_fd());
        rustix::mount::unmount(itself, UnmountFlags::DETACH)?;
        Ok(true)
    }
}

/// The kernel reads 128 KiB ahead by itself. Longer requests mean fewer turns; where that cannot be set, they
/// are merely shorter.
fn read_ahead(minor: u32) {
    let path = format!("/sys/class/bdi/0:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, (MAX_READ / 1024).to_string()) {
        tracing::debug!(%error, path, "reads will be shorter than they could be");
    }
}

impl Cut {
    fn find(minor: u32) -> Result<Self, MountError> {
        Self::open(minor).map_err(|errno| MountError::Control(errno.into()))
    }

    fn open(minor: u32) -> rustix::io::Result<Self> {
        let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let control = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::openat(&control, format!("{minor}/abort"), flags, Mode::empty())?))
    }

    pub(super) fn cut(&self) {
        // It fails when there is no connection any more.
        let _ = rustix::io::write(&self.0, b"1");
    }
}

/// Takes away what is mounted at a place.
///
/// # Errors
/// As umount(2): it is in use, and `lazy` is false.
pub fn unmount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    Ok(rustix::mount::unmount(mountpoint, flags | UnmountFlags::NOFOLLOW)?)
}
