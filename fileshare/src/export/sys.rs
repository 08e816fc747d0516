//! The requests to /dev/fuse that have no safe wrapper (`linux/fuse.h`): a further descriptor for a connection, and
//! files that the kernel reads by itself.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// `FUSE_DEV_IOC_MAGIC`.
const MAGIC: u8 = 229;

mod raw {
    use super::MAGIC;

    /// `fuse_backing_map`.
    #[repr(C)]
    pub(super) struct BackingMap {
        pub(super) fd: i32,
        pub(super) flags: u32,
        pub(super) padding: u64,
    }

    nix::ioctl_read!(clone, MAGIC, 0, u32);
    nix::ioctl_write_ptr!(backing_open, MAGIC, 1, BackingMap);
    nix::ioctl_write_ptr!(backing_close, MAGIC, 2, u32);
}

/// A file that a connection's kernel knows.
#[derive(Debug)]
pub(super) struct Backing(u32);

impl Backing {
    /// What opens mean it by.
    pub(super) fn id(&self) -> u32 {
        self.0
    }
}

/// Has the kernel keep a file, for nodes to be opened through it.
pub(super) fn backing_open(device: impl AsFd, file: impl AsFd) -> nix::Result<Backing> {
    let map = raw::BackingMap { fd: file.as_fd().as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the request reads the sixteen bytes of the map, which outlives the call. Both descriptors are open: their
    // borrows are held.
    let id = unsafe { raw::backing_open(device.as_fd().as_raw_fd(), &raw const map) }?;
    u32::try_from(id).map(Backing).map_err(|_| Errno::EINVAL)
}

/// Has the kernel let the file go, when nothing that was opened through it is open any more.
pub(super) fn backing_close(device: impl AsFd, backing: &Backing) -> nix::Result<()> {
    // SAFETY: the request reads four bytes at the pointer, which is to a number that outlives the call. The descriptor
    // is open: its borrow is held.
    unsafe { raw::backing_close(device.as_fd().as_raw_fd(), &raw const backing.0) }.map(drop)
}

/// Makes `device`, freshly opened, a further descriptor of the connection that `first` serves.
pub(super) fn clone_connection(device: impl AsFd, first: impl AsFd) -> nix::Result<()> {
    let mut number = u32::try_from(first.as_fd().as_raw_fd()).map_err(|_| Errno::EBADF)?;
    // SAFETY: the request reads four bytes at the pointer, which is to a number that outlives the call. Both
    // descriptors are open: their borrows are held.
    unsafe { raw::clone(device.as_fd().as_raw_fd(), &raw mut number) }.map(drop)
}
