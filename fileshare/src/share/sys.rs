//! The system calls on processes that have no safe wrapper: `close_range` and `fork`.

use std::io;

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
