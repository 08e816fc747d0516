//! The one unsafe corner: what runs between fork and exec, and descriptors under the async runtime.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::io::fcntl_dupfd_cloexec;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// First descriptor after the standard three.
const FIRST: i32 = 3;

/// Above all descriptors that the child is to find.
const ABOVE: i32 = 16;

/// Gives the child these descriptors as numbers 3, 4, and so on. The command owns them from here on.
pub fn pass_from_3<const N: usize>(command: &mut Command, fds: [OwnedFd; N]) -> io::Result<()> {
    let mut high = Vec::with_capacity(N);
    for fd in fds {
        // Moved out of the way first: one of them may have a number that another is to get.
        high.push(fcntl_dupfd_cloexec(fd, ABOVE)?);
    }
    let place = move || {
        for (target, fd) in (FIRST..).zip(&high) {
            // SAFETY: dup2 is async-signal-safe and takes plain numbers; `fd` is open as long as the
            // closure lives, and the child's descriptor `target` belongs to nobody at this point.
            if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure calls nothing but dup2 and reads memory that the fork has copied; it neither
    // allocates nor takes a lock.
    unsafe { command.pre_exec(place) };
    Ok(())
}

/// For waiting until `fd` is readable.
pub fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is open and stays the same one as long as the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

/// Points standard output and error to /dev/null: whoever reads the pipe behind them sees its end.
pub fn close_stdout_and_stderr() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}
