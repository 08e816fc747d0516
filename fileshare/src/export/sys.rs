//! The request to /dev/fuse that has no safe wrapper: a further descriptor for a connection.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// `FUSE_DEV_IOC_MAGIC`.
const MAGIC: u8 = 229;

mod raw {
    use super::MAGIC;

    nix::ioctl_read!(clone, MAGIC, 0, u32);
}

/// Makes `device`, freshly opened, a further descriptor of the connection that `first` serves.
pub(super) fn clone_connection(device: impl AsFd, first: impl AsFd) -> nix::Result<()> {
    let mut number = u32::try_from(first.as_fd().as_raw_fd()).map_err(|_| Errno::EBADF)?;
    // SAFETY: the request reads four bytes at the pointer, which is to a number that outlives the call. Both
    // descriptors are open: their borrows are held.
    unsafe { raw::clone(device.as_fd().as_raw_fd(), &raw mut number) }.map(drop)
}
