//! What is recorded of an inode besides its content.

use std::collections::BTreeMap;

use rustix::fs::{FileType, Statx};

/// A point in time; `nanos` is below 1,000,000,000 and counts forward, also before 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub secs: i64,
    /// Nanoseconds after `secs`.
    pub nanos: u32,
}

/// Owner, permissions and modification time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Permissions with setuid, setgid and sticky: the lower 12 bits of the mode.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When the content last changed.
    pub mtime: Time,
}

/// A device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// Identifies an inode while it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId {
    /// The file system.
    pub dev: Device,
    /// The inode in it.
    pub ino: u64,
}

/// Extended attributes in the order of their names.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// What statx(2) says of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub kind: FileType,
    pub meta: Meta,
    pub size: u64,
    pub nlink: u32,
    pub rdev: Device,
    pub id: InodeId,
    /// Bytes of storage; says nothing about the content, and may change without it.
    pub allocated: u64,
    ctime: Time,
}

impl Stat {
    /// The same content and metadata as when `earlier` was taken, as far as time stamps can tell.
    pub(crate) fn unchanged_since(&self, earlier: &Stat) -> bool {
        Self { allocated: earlier.allocated, ..*self } == *earlier
    }

    /// overlayfs's first form of a whiteout.
    pub(crate) fn is_whiteout_device(&self) -> bool {
        self.kind == FileType::CharacterDevice && self.rdev == Device { major: 0, minor: 0 }
    }
}

impl From<&Statx> for Stat {
    fn from(statx: &Statx) -> Self {
        let time = |secs, nanos| Time { secs, nanos };
        Self {
            kind: FileType::from_raw_mode(statx.stx_mode.into()),
            meta: Meta {
                mode: statx.stx_mode & 0o7777,
                uid: statx.stx_uid,
                gid: statx.stx_gid,
                mtime: time(statx.stx_mtime.tv_sec, statx.stx_mtime.tv_nsec),
            },
            size: statx.stx_size,
            nlink: statx.stx_nlink,
            rdev: Device { major: statx.stx_rdev_major, minor: statx.stx_rdev_minor },
            id: InodeId {
                dev: Device { major: statx.stx_dev_major, minor: statx.stx_dev_minor },
                ino: statx.stx_ino,
            },
            allocated: statx.stx_blocks.saturating_mul(512),
            ctime: time(statx.stx_ctime.tv_sec, statx.stx_ctime.tv_nsec),
        }
    }
}
