//! The one step between fork and exec.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use tokio::process::Command;

/// Makes the child inherit `fds` under the numbers that they have here.
pub(super) fn inherit(command: &mut Command, fds: Vec<OwnedFd>) {
    let keep_open = move || {
        for fd in &fds {
            // SAFETY: F_SETFD takes a plain number and changes a flag of a descriptor that `fds`, in this
            // closure, keeps open.
            if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec, `keep_open` only calls fcntl, which is async-signal-safe, and
    // allocates nothing: an OS error is a number.
    unsafe { command.pre_exec(keep_open) };
}
