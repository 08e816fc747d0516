//! The mount itself: made apart, given a connection, and only then put in its place.
//!
//! ```text
//!   /dev/fuse ─ fsopen, fsconfig ─> superblock ─ INIT ─> ready ─ move_mount ─> mountpoint
//!                                        └ fusectl: a handle that cuts the connection, wherever the mount went
//! ```

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::config::Config;
use super::device::Device;
use super::pipe::MAX_READ;

/// A mount that is not in its place yet.
#[derive(Debug)]
pub(super) struct Apart {
    pub(super) device: Device,
    pub(super) cut: Cut,
    mount: OwnedFd,
    minor: u32,
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
    Place(std::path::PathBuf, #[source] io::Error),
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
        let minor = device_minor(&mount).map_err(failed("statx"))?;
        Ok(Self { device, cut: Cut::find(minor)?, mount, minor })
    }

    /// Puts the mount in its place.
    pub(super) fn place(self, config: &Config) -> Result<(Device, Cut), MountError> {
        read_ahead(self.minor);
        let placed = |errno: rustix::io::Errno| MountError::Place(config.mountpoint.clone(), errno.into());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let target = rustix::fs::open(&config.mountpoint, flags, Mode::empty()).map_err(placed)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&self.mount, c"", &target, c"", flags).map_err(placed)?;
        Ok((self.device, self.cut))
    }
}

/// A FUSE mount's device has major 0; its minor names the connection. Asked without a request to the guest,
/// which nobody would answer yet.
fn device_minor(mount: &OwnedFd) -> rustix::io::Result<u32> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    Ok(rustix::fs::statx(mount, c"", flags, rustix::fs::StatxFlags::empty())?.stx_dev_minor)
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

/// Takes a mount away.
///
/// # Errors
/// As umount(2): it is in use, and `lazy` is false.
pub fn unmount(mountpoint: &std::path::Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy { rustix::mount::UnmountFlags::DETACH } else { rustix::mount::UnmountFlags::empty() };
    Ok(rustix::mount::unmount(mountpoint, flags | rustix::mount::UnmountFlags::NOFOLLOW)?)
}
