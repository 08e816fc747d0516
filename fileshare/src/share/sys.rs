//! The system calls that have no safe wrapper: `mount_setattr`, `close_range` and `fork`.

use std::ffi::c_long;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Which mounts of a tree an attribute change reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// The top mount.
    One,
    /// It and all below.
    All,
}

/// Sets mount attributes (`MOUNT_ATTR_*`) on the mount that `mount` is the root of.
pub(super) fn mount_setattr(mount: impl AsFd, reach: Reach, set: u64) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
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

/// Closes every descriptor from `first` on. For the start of a program, before it has opened anything.
pub(super) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the call touches no memory. It may close a descriptor that an object owns, but at the start of
    // the program no object does.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What [`fork`] returned as.
pub(super) enum Forked {
    /// In the new process.
    Child,
    /// In the old one: the new one's ID.
    Parent(rustix::process::Pid),
}

/// Forks a process that has one thread.
///
/// # Errors
/// As fork(2) does; also when the process has more than one thread, since the child could then find a
/// lock taken that nobody releases.
pub(super) fn fork() -> io::Result<Forked> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the process already has threads"));
    }
    // SAFETY: there is no other thread, checked above, so the child's memory is consistent.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => match rustix::process::Pid::from_raw(pid) {
            Some(pid) => Ok(Forked::Parent(pid)),
            None => Err(io::Error::other("fork returned an impossible process ID")),
        },
    }
}
