//! What the kernel asked, as far as the answer is measured by it.

use crate::export::wire::abi::{IN_HEADER, InHeader, flag, op};
use crate::export::wire::codec::Take;

/// A request of which an answer is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// One of [`op`].
    pub opcode: u32,
    /// What the answer must carry.
    pub unique: u64,
    /// What it is about.
    pub nodeid: u64,
    /// The most bytes that the answer may hold, or may claim to have written; for MKNOD the mode, for FIND how many
    /// names.
    pub size: u64,
}

impl Question {
    /// Looks at a request. The kernel is trusted: what is missing counts as 0.
    pub fn of(message: &[u8]) -> Self {
        let header = InHeader::take(&mut Take::new(message)).unwrap_or_default();
        let body = message.get(IN_HEADER..).unwrap_or_default();
        let size = match header.opcode {
            op::READ | op::READDIR | op::READDIRPLUS | op::WRITE | op::OPEN_READ => u32_at(body, 16).into(),
            op::GETXATTR | op::LISTXATTR | op::MKNOD | op::OPENDIR_READ => u32_at(body, 0).into(),
            op::COPY_FILE_RANGE => u64_at(body, 40),
            op::FIND => body.iter().filter(|byte| **byte == 0).count() as u64,
            _ => 0,
        };
        Self { opcode: header.opcode, unique: header.unique, nodeid: header.nodeid, size }
    }
}

/// The number at a place of a message that the kernel made; 0 past its end.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |number| u32::from_le_bytes(*number))
}

/// As [`u32_at`].
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |number| u64::from_le_bytes(*number))
}

/// Writes a number over the one at a place that the message has.
pub(super) fn put_u64_at(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// As [`put_u64_at`].
pub(super) fn put_u32_at(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

/// Where in a request's body the handles of open files are.
pub(super) fn handle_places(opcode: u32, body: &[u8]) -> &'static [usize] {
    match opcode {
        op::READ | op::WRITE | op::RELEASE | op::FSYNC | op::FLUSH | op::READDIR | op::READDIRPLUS => &[0],
        op::RELEASEDIR | op::FSYNCDIR | op::FALLOCATE | op::LSEEK | op::GETLK | op::SETLK | op::SETLKW => {
            &[0]
        }
        op::COPY_FILE_RANGE => &[0, 24],
        op::SETATTR if u32_at(body, 0) & flag::FATTR_FH != 0 => &[8],
        _ => &[],
    }
}

/// The name under which the kernel is told of a node by the answer; of one without a name, an empty one.
pub(super) fn made(opcode: u32, body: &[u8]) -> Option<&[u8]> {
    match opcode {
        op::LOOKUP => Some(string(body, 0)),
        op::TMPFILE => Some(b""),
        _ => name_made(opcode, body),
    }
}

fn name_made(opcode: u32, body: &[u8]) -> Option<&[u8]> {
    match opcode {
        op::SYMLINK => Some(string(body, 0)),
        op::MKDIR | op::LINK => Some(string(body, 8)),
        op::MKNOD | op::CREATE => Some(string(body, 16)),
        _ => None,
    }
}

/// The names that a request makes, moves or removes, and the folders that they are in.
pub(super) fn names_taken<'a>(header: &InHeader, body: &'a [u8]) -> [Option<(u64, &'a [u8])>; 2] {
    let here = |name| Some((header.nodeid, name));
    let at = match header.opcode {
        op::UNLINK | op::RMDIR => return [here(string(body, 0)), None],
        op::RENAME => 8,
        op::RENAME2 => 16,
        opcode => return [name_made(opcode, body).and_then(here), None],
    };
    let old = string(body, at);
    [here(old), Some((u64_at(body, 0), string(body, at + old.len() + 1)))]
}

/// From a place of a body up to the NUL.
fn string(body: &[u8], at: usize) -> &[u8] {
    body.get(at..).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Whether a request may change what another request's answer said of a file or folder.
pub(super) fn changes(opcode: u32, body: &[u8]) -> bool {
    match opcode {
        op::OPEN => opens_to_write(u32_at(body, 0)),
        op::SETATTR | op::SYMLINK | op::MKNOD | op::MKDIR | op::UNLINK | op::RMDIR | op::RENAME => true,
        op::RENAME2 | op::LINK | op::WRITE | op::SETXATTR | op::REMOVEXATTR | op::CREATE => true,
        op::TMPFILE | op::FALLOCATE | op::COPY_FILE_RANGE => true,
        _ => false,
    }
}

/// Whether open(2) flags do more than let read.
pub(super) fn opens_to_write(flags: u32) -> bool {
    let flags = flags.cast_signed();
    flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0
}

/// Whether the guest's server knows it. All else is answered here: ENOSYS, which the kernel remembers.
pub(super) fn is_served(opcode: u32) -> bool {
    matches!(
        opcode,
        op::LOOKUP..=op::SYMLINK
            | op::MKNOD..=op::RELEASE
            | op::FSYNC..=op::FLUSH
            | op::OPENDIR..=op::SETLKW
            | op::CREATE
            | op::FALLOCATE..=op::COPY_FILE_RANGE
            | op::SYNCFS
            | op::TMPFILE
    )
}
