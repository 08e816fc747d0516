//! The system call on mounts that has no safe wrapper: `mount_setattr`.

use std::ffi::c_long;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Which mounts of a tree an attribute change reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The top mount.
    One,
    /// It and all below.
    All,
}

/// Sets mount attributes (`MOUNT_ATTR_*`) on the mount that `mount` is the root of, and how mounts propagate to it
/// (`MS_PRIVATE`, ...; 0: as before).
pub(crate) fn mount_setattr(mount: impl AsFd, reach: Reach, set: u64, propagation: u64) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    let recursive = if reach == Reach::All { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated constant, `attr` outlives the call and its true size is given;
    // the kernel writes to neither.
    let result: c_long = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(&attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
