//! The kernel's FUSE protocol, as far as it crosses the export: numbers and the structs that both sides read.
//!
//! Everything is little-endian, which is the byte order of every machine that a guest runs on here, and laid
//! out as `linux/fuse.h` (protocol 7.40) says. No struct is cast from bytes: [`super::codec`] takes them apart.

use super::codec::{Malformed, Put, Take};

/// What a message asks for.
#[allow(missing_docs)] // The names are the kernel's.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    /// Ours: open for reading and read. `flags:u32 how:u32 offset:u64 size:u32 0:u32`, answered by
    /// `handle:u64 hint:u32 0:u32`, a hint of so many bytes, and data. The handle is 0 when the data reaches the
    /// file's end, or the file is lent: nothing stays open.
    pub const OPEN_READ: u32 = 0x8001;
    /// Ours: open a folder and list it. `size:u32 0:u32`, answered by `handle:u64 whole:u32 entries:u32 path:u32
    /// 0:u32`, so many bytes of entries as READDIRPLUS has them, so many of the folder's path in the layers, and
    /// either nothing or, for each entry, a `u16`: 0, or the number of the lower layer that a file lies in, or that
    /// a folder lies in whole, from 1. `whole` is 1 when no more entries follow.
    pub const OPENDIR_READ: u32 = 0x8002;
    /// Ours: look up names one below the other, each of which a NUL ends. Answered by an entry for each, or an error.
    /// The next request may mean these nodes by their place among the names ([`super::FOUND`]).
    pub const FIND: u32 = 0x8003;
    /// Ours: a sign of life. `0:u64`, answered by nothing but that.
    pub const SIGN: u32 = 0x8004;
}

/// Whether a message is never answered. On the wire this holds for releases too: the kernel waits for no
/// release, so its answer would only cost a turn.
pub fn is_silent(opcode: u32) -> bool {
    matches!(opcode, op::FORGET | op::BATCH_FORGET | op::RELEASE | op::RELEASEDIR | op::INTERRUPT)
}

/// How many folders' attributes follow the kernel's answer: those that the request changed, as they are now, which
/// the kernel asks for next. A rename's are the new folder's, then the old one's.
pub fn folders_after(opcode: u32) -> usize {
    match opcode {
        op::MKNOD | op::MKDIR | op::SYMLINK | op::LINK | op::CREATE | op::UNLINK | op::RMDIR => 1,
        op::RENAME | op::RENAME2 => 2,
        _ => 0,
    }
}

/// Length of what stands between a LOOKUP's entry and the path in the layers of a folder that lies in one of them
/// whole: `layer:u32 0:u32`, the layer from 1. Nothing follows the entry of anything else.
pub const PURE: usize = 8;

/// Length of what stands before an OPENDIR_READ's entries.
pub const LISTED: usize = 24;

/// In an OPEN's answer, where the kernel expects nothing: the file has no capabilities, so no write needs to take
/// any away.
pub const NO_CAPABILITIES: u32 = 1;

/// The attribute that is asked for before a file is written to.
pub const CAPABILITIES: &[u8] = b"security.capability";

/// Features that kernel and server agree on in INIT.
#[allow(missing_docs)] // The names are the kernel's.
pub mod feature {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
    pub const PASSTHROUGH: u64 = 1 << 37;
    /// Ours: files of the upper folder are lent to the host.
    pub const LEND: u64 = 1 << 63;
}

/// Flags inside messages.
#[allow(missing_docs)] // The names are the kernel's.
pub mod flag {
    pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
    pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
    pub const FOPEN_PASSTHROUGH: u32 = 1 << 7;
    pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
    /// Ours, in OPEN and OPEN_READ: the host cannot use the file by itself.
    pub const OPEN_NOT_LENT: u32 = 1 << 31;
    pub const GETATTR_FH: u32 = 1 << 0;
    pub const FATTR_MODE: u32 = 1 << 0;
    pub const FATTR_UID: u32 = 1 << 1;
    pub const FATTR_GID: u32 = 1 << 2;
    pub const FATTR_SIZE: u32 = 1 << 3;
    pub const FATTR_ATIME: u32 = 1 << 4;
    pub const FATTR_MTIME: u32 = 1 << 5;
    pub const FATTR_FH: u32 = 1 << 6;
    pub const FATTR_ATIME_NOW: u32 = 1 << 7;
    pub const FATTR_MTIME_NOW: u32 = 1 << 8;
    pub const FATTR_KILL_SUIDGID: u32 = 1 << 11;
    pub const WRITE_CACHE: u32 = 1 << 0;
    pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
    pub const LK_FLOCK: u32 = 1 << 0;
    pub const FSYNC_FDATASYNC: u32 = 1 << 0;
    pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
}

/// The name of a request, for people.
pub fn name(opcode: u32) -> &'static str {
    const NAMES: [(u32, &str); 31] = [
        (op::LOOKUP, "lookup"),
        (op::GETATTR, "getattr"),
        (op::SETATTR, "setattr"),
        (op::READLINK, "readlink"),
        (op::SYMLINK, "symlink"),
        (op::MKNOD, "mknod"),
        (op::MKDIR, "mkdir"),
        (op::UNLINK, "unlink"),
        (op::RMDIR, "rmdir"),
        (op::RENAME, "rename"),
        (op::RENAME2, "rename2"),
        (op::LINK, "link"),
        (op::OPEN, "open"),
        (op::OPEN_READ, "open and read"),
        (op::READ, "read"),
        (op::WRITE, "write"),
        (op::STATFS, "statfs"),
        (op::FSYNC, "fsync"),
        (op::SETXATTR, "setxattr"),
        (op::GETXATTR, "getxattr"),
        (op::LISTXATTR, "listxattr"),
        (op::REMOVEXATTR, "removexattr"),
        (op::FLUSH, "flush"),
        (op::OPENDIR_READ, "opendir and read"),
        (op::READDIRPLUS, "readdirplus"),
        (op::FIND, "find"),
        (op::CREATE, "create"),
        (op::TMPFILE, "tmpfile"),
        (op::FALLOCATE, "fallocate"),
        (op::LSEEK, "lseek"),
        (op::COPY_FILE_RANGE, "copy_file_range"),
    ];
    NAMES.iter().find(|(known, _)| *known == opcode).map_or("other", |(_, name)| name)
}

/// Node IDs that the guest gives are below; those above are the host's own.
pub const OWN_NODES: u64 = 1 << 63;

/// In the request that follows a FIND on its stream, this and the place of a name in it stand for the node that it
/// finds, so that the host need not wait for its answer.
pub const FOUND: u64 = OWN_NODES;

/// The folder that a mount shows.
pub const ROOT_ID: u64 = 1;

/// The most data that one READ or WRITE carries.
pub const MAX_DATA: u32 = 1 << 20;

/// The longest path, and the longest target of a symbolic link.
pub const PATH_MAX: usize = 4096;

/// The longest message: data, its header and its struct. The kernel wants a page for those two.
pub const MAX_MESSAGE: usize = MAX_DATA as usize + 4096;

/// Length of `fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Where in a message its node is.
pub const NODEID: usize = 16;
/// Length of `fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// Length of `fuse_attr`.
pub const ATTR: usize = 88;
/// Length of `fuse_attr_out`.
pub const ATTR_OUT: usize = 16 + ATTR;
/// Length of `fuse_entry_out`.
pub const ENTRY_OUT: usize = 40 + ATTR;
/// Length of `fuse_open_out`.
pub const OPEN_OUT: usize = 16;
/// Length of `fuse_dirent` without the name.
pub const DIRENT: usize = 24;
/// The longest name of a folder's entry.
pub const NAME_MAX: usize = 255;

/// Where in a message the numbers of nodes are.
pub fn node_places(opcode: u32) -> &'static [usize] {
    match opcode {
        op::RENAME | op::RENAME2 | op::LINK => &[NODEID, IN_HEADER],
        op::COPY_FILE_RANGE => &[NODEID, IN_HEADER + 16],
        _ => &[NODEID],
    }
}

/// `fuse_in_header`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InHeader {
    /// Length of the whole message.
    pub len: u32,
    /// One of [`op`].
    pub opcode: u32,
    /// Names the request in its answer.
    pub unique: u64,
    /// What it is about.
    pub nodeid: u64,
    /// Who asks.
    pub uid: u32,
    /// Who asks.
    pub gid: u32,
    /// Who asks.
    pub pid: u32,
    /// Length of the extensions at the message's end, in units of eight bytes.
    pub extensions: u16,
}

impl InHeader {
    /// Takes the header off a message.
    ///
    /// # Errors
    /// The message is shorter.
    pub fn take(from: &mut Take<'_>) -> Result<Self, Malformed> {
        let header = Self {
            len: from.u32()?,
            opcode: from.u32()?,
            unique: from.u64()?,
            nodeid: from.u64()?,
            uid: from.u32()?,
            gid: from.u32()?,
            pid: from.u32()?,
            extensions: from.u16()?,
        };
        from.u16()?;
        Ok(header)
    }

    /// Appends the header.
    pub fn put(&self, to: &mut impl Put) {
        to.u32(self.len).u32(self.opcode).u64(self.unique).u64(self.nodeid);
        to.u32(self.uid).u32(self.gid).u32(self.pid).u16(self.extensions).u16(0);
    }
}

/// `fuse_out_header`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutHeader {
    /// Length of the whole message.
    pub len: u32,
    /// 0, or an error number with a minus sign.
    pub error: i32,
    /// The request that is answered.
    pub unique: u64,
}

impl OutHeader {
    /// Takes the header off a message.
    ///
    /// # Errors
    /// The message is shorter.
    pub fn take(from: &mut Take<'_>) -> Result<Self, Malformed> {
        Ok(Self { len: from.u32()?, error: from.i32()?, unique: from.u64()? })
    }

    /// Appends the header.
    pub fn put(&self, to: &mut impl Put) {
        to.u32(self.len).i32(self.error).u64(self.unique);
    }
}

/// `fuse_attr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are those of stat(2).
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: u64,
    pub mtime: u64,
    pub ctime: u64,
    pub atimensec: u32,
    pub mtimensec: u32,
    pub ctimensec: u32,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
    pub flags: u32,
}

impl Attr {
    /// Takes the attributes off a message.
    ///
    /// # Errors
    /// The message is shorter.
    pub fn take(from: &mut Take<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            ino: from.u64()?,
            size: from.u64()?,
            blocks: from.u64()?,
            atime: from.u64()?,
            mtime: from.u64()?,
            ctime: from.u64()?,
            atimensec: from.u32()?,
            mtimensec: from.u32()?,
            ctimensec: from.u32()?,
            mode: from.u32()?,
            nlink: from.u32()?,
            uid: from.u32()?,
            gid: from.u32()?,
            rdev: from.u32()?,
            blksize: from.u32()?,
            flags: from.u32()?,
        })
    }

    /// Appends the attributes.
    pub fn put(&self, to: &mut impl Put) {
        to.u64(self.ino).u64(self.size).u64(self.blocks);
        to.u64(self.atime).u64(self.mtime).u64(self.ctime);
        to.u32(self.atimensec).u32(self.mtimensec).u32(self.ctimensec);
        to.u32(self.mode).u32(self.nlink).u32(self.uid).u32(self.gid);
        to.u32(self.rdev).u32(self.blksize).u32(self.flags);
    }

    /// The file's type, one of `S_IFMT`.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

/// `fuse_entry_out`, without the times for which it may be remembered: those are the host's to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The node; 0 for "no such name".
    pub nodeid: u64,
    /// Its attributes.
    pub attr: Attr,
}

impl Entry {
    /// Takes the entry off a message.
    ///
    /// # Errors
    /// The message is shorter, or names a generation (node IDs are never used again, so it is always 0).
    pub fn take(from: &mut Take<'_>) -> Result<Self, Malformed> {
        let nodeid = from.u64()?;
        let unused = [from.u64()?, from.u64()?, from.u64()?, from.u64()?];
        if unused != [0; 4] {
            return Err(Malformed("an entry with a generation or a time to remember it"));
        }
        Ok(Self { nodeid, attr: Attr::take(from)? })
    }

    /// Takes the entry off a message that was checked and completed.
    ///
    /// # Errors
    /// The message is shorter.
    pub fn take_completed(message: &[u8]) -> Result<Self, Malformed> {
        let mut take = Take::new(message);
        let nodeid = take.u64()?;
        take.bytes(ENTRY_OUT - ATTR - 8)?;
        Ok(Self { nodeid, attr: Attr::take(&mut take)? })
    }

    /// Appends the entry.
    pub fn put(&self, to: &mut impl Put) {
        to.u64(self.nodeid).u64(0).u64(0).u64(0).u64(0);
        self.attr.put(to);
    }
}

/// Length of a folder's entry on the wire, padding included.
pub fn dirent_len(name: usize) -> usize {
    (DIRENT + name).next_multiple_of(8)
}
