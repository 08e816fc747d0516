//! The few kernel interfaces that have no safe wrapper in the crates used.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with};
use rustix::process::Pid;
use vmctr_proto::SEED_BYTES;

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

/// struct rand_pool_info of linux/random.h with its bytes.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; SEED_BYTES],
}

const _: () = assert!(size_of::<Entropy>() == 8 + SEED_BYTES);

/// Mixes secret bytes into the kernel's random number generator, counts them as fully random, and makes all
/// CPUs' generators start from the new state.
pub fn reseed(seed: &[u8; SEED_BYTES]) -> io::Result<()> {
    /// _IOW('R', 0x03, int[2])
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    /// _IO('R', 0x07)
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let random = File::options().write(true).open("/dev/random")?;
    let entropy =
        Entropy { bits: SEED_BYTES as libc::c_int * 8, size: SEED_BYTES as libc::c_int, bytes: *seed };
    // SAFETY: the kernel reads the two numbers and `size` bytes after them, all inside `entropy`.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const entropy) })?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One BPF instruction: struct bpf_insn of linux/bpf.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BpfInstruction {
    /// Class, source or size, operation or mode.
    pub code: u8,
    /// Target in the low, source in the high half.
    pub registers: u8,
    /// Of a jump or a memory access.
    pub offset: i16,
    /// Operand.
    pub immediate: i32,
}

const _: () = assert!(size_of::<BpfInstruction>() == 8);

/// The head of union bpf_attr for BPF_PROG_LOAD.
#[repr(C)]
struct BpfLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

/// The head of union bpf_attr for BPF_PROG_ATTACH.
#[repr(C)]
struct BpfAttach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Has the kernel check and compile a program that decides over device accesses.
pub fn load_device_program(program: &[BpfInstruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const BPF_PROG_LOAD: libc::c_int = 5;
    let load = BpfLoad {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    // SAFETY: the kernel reads `insn_cnt` instructions of 8 bytes and a C string, which live across the call.
    let loaded = unsafe { bpf(BPF_PROG_LOAD, &load) }?;
    // SAFETY: BPF_PROG_LOAD returned a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(loaded) })
}

/// Makes a loaded program decide over all device accesses from a control group, instead of an earlier one.
pub fn attach_device_program(group: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_PROG_ATTACH: libc::c_int = 8;
    let attach = BpfAttach {
        target_fd: group.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: 0,
    };
    // SAFETY: the attribute holds two open descriptors and no pointer.
    unsafe { bpf(BPF_PROG_ATTACH, &attach) }.map(drop)
}

/// bpf(2).
///
/// # Safety
/// `attribute` is the beginning of union bpf_attr for this command, and its pointers hold for the call.
unsafe fn bpf<T>(command: libc::c_int, attribute: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of the attribute and takes the rest as zero; the
    // caller answers for what it points to.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
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
