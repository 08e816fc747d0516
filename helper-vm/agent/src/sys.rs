//! The few kernel interfaces that have no safe wrapper in the crates used.

use std::io;

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with};
use rustix::process::Pid;

/// Restores SIGPIPE's default action, which Rust's start-up code sets to "ignore" and an executed program
/// would inherit.
pub fn default_sigpipe() {
    // SAFETY: SIG_DFL installs no handler; the process has one thread.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// A signal's number that a process can be sent, real-time ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal(libc::c_int);

impl Signal {
    /// Cannot be caught.
    pub const KILL: Self = Self(libc::SIGKILL);

    /// Checks the number; 32 and 33 belong to the C library.
    pub fn parse(number: u32) -> Option<Self> {
        matches!(number, 1..=31 | 34..=64).then_some(Self(number as libc::c_int))
    }
}

/// Sends a signal to one process.
pub fn kill(pid: Pid, signal: Signal) -> io::Result<()> {
    // SAFETY: kill takes numbers only.
    match unsafe { libc::kill(pid.as_raw_nonzero().get(), signal.0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// RTM_NEWLINK for interface 1 (always the loopback) with IFF_UP: nlmsghdr, ifinfomsg (linux/rtnetlink.h).
const LOOPBACK_UP: [u8; 32] = {
    let mut message = [0; 32];
    message[0] = 32; // length
    message[4] = 16; // RTM_NEWLINK
    message[6] = 5; // NLM_F_REQUEST | NLM_F_ACK
    message[20] = 1; // ifi_index
    message[24] = 1; // ifi_flags: IFF_UP
    message[28] = 1; // ifi_change: IFF_UP
    message
};

/// Brings up the loopback interface of the caller's network namespace.
pub fn loopback_up() -> io::Result<()> {
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    send(&socket, &LOOPBACK_UP, SendFlags::empty())?;
    let mut reply = [0_u8; 64];
    let length = rustix::io::read(&socket, &mut reply)?;
    match acknowledged(&reply[..length]) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => Err(io::Error::other("netlink answered with something else than an acknowledgement")),
    }
}

/// The error number of an NLMSG_ERROR message, 0 for success.
fn acknowledged(message: &[u8]) -> Option<i32> {
    const NLMSG_ERROR: [u8; 2] = [2, 0];
    (message.get(4..6)? == NLMSG_ERROR).then_some(())?;
    let code = message.get(16..20)?.try_into().ok()?;
    Some(-i32::from_ne_bytes(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_those_that_a_process_may_get() {
        for (number, legal) in
            [(0, false), (9, true), (32, false), (33, false), (37, true), (64, true), (65, false)]
        {
            assert_eq!(Signal::parse(number).is_some(), legal, "{number}");
        }
    }

    #[test]
    fn an_acknowledgement_carries_the_negated_error_number() {
        let mut message = [0; 36];
        message[4] = 2;
        assert_eq!(acknowledged(&message), Some(0));
        message[16..20].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(acknowledged(&message), Some(libc::EPERM));
        message[4] = 16;
        assert_eq!(acknowledged(&message), None);
        assert_eq!(acknowledged(&message[..10]), None);
    }
}
