//! What lies in a lower layer, as the host sees it.
//!
//! Invariants:
//! 1. Nothing is opened but folders, beneath a layer's folder, on its file system; symbolic links are never followed.
//! 2. What is called usual looks through an overlay as it does here: nothing that an overlay gives a meaning to
//!    (whiteouts, its extended attributes), no file with several names (a copy-up separates them), no device, fifo or
//!    socket.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::check::check_attr;
use super::layers::Layers;
use crate::export::stat::attr;
use crate::export::wire::abi::Attr;

/// Room for the names of a file's extended attributes. One with more is not usual.
const XATTRS: usize = 4096;

/// What an overlay's own extended attributes begin with.
const MARKS: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// The layers' folders.
#[derive(Debug)]
pub(super) struct Beneath {
    layers: Layers,
    device: (u32, u32),
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// There is none.
    Nothing,
    /// What looks the same through an overlay, and whether it has no extended attributes at all.
    Usual(Attr, bool),
    /// What only the guest can tell about.
    Unusual,
    /// What means something to an overlay: other names in the folder may, too.
    Mark,
}

impl Beneath {
    /// Looks into the layers; `None` if they lie on several file systems, where a file's number is the guest's to choose.
    pub(super) fn new(layers: Layers) -> io::Result<Option<Self>> {
        let mut devices = Vec::new();
        for layer in layers.all() {
            let st = rustix::fs::statx(layer, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
            devices.push((st.stx_dev_major, st.stx_dev_minor));
        }
        devices.dedup();
        Ok(match devices[..] {
            [device] => Some(Self { layers, device }),
            _ => None,
        })
    }

    /// Opens a folder of a layer.
    pub(super) fn folder(&self, layer: usize, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        let layer = self.layers.get(layer).ok_or(Errno::NOENT)?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let path = if path.is_empty() { b"." } else { path };
        let open = |flags| {
            let flags = flags | OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat2(layer, OsStr::from_bytes(path), flags, Mode::empty(), resolve)
        };
        // As an overlay does, which takes owning the folder.
        open(OFlags::NOATIME).or_else(|_| open(OFlags::empty()))
    }

    /// Looks at what a folder has under a name, which is one component.
    pub(super) fn look(&self, folder: &OwnedFd, name: &[u8]) -> Found {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let st = match rustix::fs::statx(folder, OsStr::from_bytes(name), flags, StatxFlags::BASIC_STATS) {
            Ok(st) => st,
            Err(Errno::NOENT) => return Found::Nothing,
            Err(_) => return Found::Unusual,
        };
        let attr = attr(&st, st.stx_ino);
        let here = (st.stx_dev_major, st.stx_dev_minor) == self.device && check_attr(&attr).is_ok();
        match attr.kind() {
            libc::S_IFCHR if attr.rdev == 0 => Found::Mark,
            libc::S_IFDIR if here => of_xattrs(folder, name, attr),
            libc::S_IFREG | libc::S_IFLNK if here && attr.nlink == 1 => of_xattrs(folder, name, attr),
            _ => Found::Unusual,
        }
    }

    /// Where a symbolic link leads.
    pub(super) fn target(&self, layer: usize, path: &[u8], name: &[u8]) -> rustix::io::Result<Vec<u8>> {
        let folder = self.folder(layer, path)?;
        let target = rustix::fs::readlinkat(folder, OsStr::from_bytes(name), Vec::new())?;
        Ok(target.into_bytes())
    }
}

fn of_xattrs(folder: &OwnedFd, name: &[u8], attr: Attr) -> Found {
    // The only way to a name's attributes without opening what it names.
    let mut path = format!("/proc/self/fd/{}/", folder.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let mut names = [0; XATTRS];
    let length = match rustix::fs::llistxattr(OsStr::from_bytes(&path), &mut names) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(_) => return Found::Unusual,
    };
    let marked = |name: &[u8]| MARKS.iter().any(|mark| name.starts_with(mark));
    if names[..length].split(|byte| *byte == 0).any(marked) {
        return Found::Mark;
    }
    Found::Usual(attr, length == 0)
}

/// A folder's entry, as it is read from the disk.
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) name: Box<CStr>,
    pub(super) ino: u64,
    pub(super) next: u64,
    /// `DT_*`.
    pub(super) kind: u32,
}

/// Reads entries from `offset` on, until `enough` says so; whether the folder's end was reached.
pub(super) fn read_folder(
    folder: &OwnedFd,
    offset: u64,
    mut enough: impl FnMut(Raw) -> bool,
) -> rustix::io::Result<bool> {
    const BATCH: usize = 32 * 1024;
    if offset != 0 {
        rustix::fs::seek(folder, rustix::fs::SeekFrom::Start(offset))?;
    }
    let mut buffer = Vec::with_capacity(BATCH);
    let mut entries = rustix::fs::RawDir::new(folder, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let kind = entry.file_type();
        let kind = if kind == rustix::fs::FileType::Unknown { 0 } else { kind.as_raw_mode() >> 12 };
        let (ino, next) = (entry.ino(), entry.next_entry_cookie());
        if enough(Raw { name: entry.file_name().into(), ino, next, kind }) {
            return Ok(false);
        }
    }
    Ok(true)
}
