//! A process named so that a reused process ID is never taken for it: ID, start time, host boot.

use std::os::fd::OwnedFd;
use std::time::Duration;
use std::{fmt, fs, io};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// What a recorded process does for its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The shim, which owns all others.
    Shim,
    /// The virtual machine.
    Qemu,
    /// The share daemon.
    Fsd,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shim => "shim",
            Self::Qemu => "qemu",
            Self::Fsd => "fsd",
        })
    }
}

/// One process of a VM on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostProcess {
    /// What it is.
    pub role: Role,
    /// Its process ID.
    pub pid: u32,
    /// Clock ticks from boot to its start: field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

impl HostProcess {
    /// Records a process that lives now.
    ///
    /// # Errors
    /// There is none with this ID.
    pub fn of_live(role: Role, pid: u32) -> io::Result<Self> {
        Ok(Self { role, pid, start_time: start_time(pid)? })
    }

    /// Whether the very process still runs. A zombie does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.pidfd().is_some_and(|pidfd| !exited(&pidfd, Duration::ZERO))
    }

    /// SIGKILL, then waits for the exit. The caller need not be the parent. `false`: still there after
    /// `limit`.
    pub(super) fn kill(&self, limit: Duration) -> bool {
        let Some(pidfd) = self.pidfd() else { return true };
        // Fails only when the process is gone by now, which the wait sees.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        exited(&pidfd, limit)
    }

    /// The start time is read after the file descriptor was taken: if it matches, the descriptor is that
    /// process and stays so even when the number is used again.
    fn pidfd(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        (start_time(self.pid).ok()? == self.start_time).then_some(pidfd)
    }
}

/// A pidfd becomes readable when its process has exited.
fn exited(pidfd: &OwnedFd, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&limit)), Ok(ready) if ready > 0)
}

fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time"))
}

/// The second field is the command in brackets and may hold spaces and brackets of its own.
fn parse_start_time(stat: &str) -> Option<u64> {
    const FIELDS_FROM_STATE: usize = 22 - 3;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(FIELDS_FROM_STATE)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_command_may_hold_brackets() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1";
        assert_eq!(parse_start_time(stat), Some(4242));
        assert_eq!(parse_start_time("7 (x) S 1"), None);
    }

    #[test]
    fn a_live_process_is_killed_once() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = HostProcess::of_live(Role::Qemu, child.id()).unwrap();
        assert!(process.is_alive());
        assert!(process.kill(Duration::from_secs(5)));
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(process.kill(Duration::ZERO));
    }

    #[test]
    fn a_reused_process_id_is_left_alone() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let mut process = HostProcess::of_live(Role::Qemu, child.id()).unwrap();
        process.start_time += 1;
        assert!(!process.is_alive());
        assert!(process.kill(Duration::ZERO));
        assert!(child.try_wait().unwrap().is_none(), "killed another process");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
