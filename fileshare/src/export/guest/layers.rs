//! Which lower file of the host's an overlay's file is, as a hint to the host, which can then read it by itself.
//!
//! The overlay does not tell, so it is found by looking: the file's present path below the root, in the upper
//! folder (then it is no lower file) and in the lower ones from the top. What is found is believed only if it is
//! in all respects the same file. A renamed folder's files are at another path in the layer: no hint for those.
//! The host believes nothing of it either and looks for itself.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, Statx};
use rustix::io::Errno;

use super::message::Answer;
use super::nodes::{Node, magic, stat};
use crate::export::wire::codec::Put;

/// The folders that an overlay is made of.
#[derive(Debug)]
pub struct Layers {
    upper: Option<OwnedFd>,
    lowers: Vec<OwnedFd>,
}

/// A lower file's place.
#[derive(Debug)]
pub(super) struct Hint {
    layer: u32,
    path: PathBuf,
    st: Statx,
}

impl Layers {
    /// The folders as the guest has them mounted, lower ones from the top, in the order that the host knows.
    ///
    /// # Errors
    /// One cannot be opened.
    pub fn open(upper: Option<&Path>, lowers: &[PathBuf]) -> std::io::Result<Self> {
        let folder = |path: &Path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        };
        let upper = upper.map(folder).transpose()?;
        let lowers = lowers.iter().map(|path| folder(path)).collect::<Result<_, _>>()?;
        Ok(Self { upper, lowers })
    }

    /// Finds the lower file behind `node`, below the folder at `root`.
    pub(super) fn find(&self, root: &OwnedFd, node: &Node) -> Option<Hint> {
        let path = place(root, node)?;
        if let Some(upper) = &self.upper {
            match look(upper, &path) {
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                _ => return None,
            }
        }
        let merged = stat(node).ok()?;
        let found = |(layer, lower)| match look(lower, &path) {
            Err(Errno::NOENT | Errno::NOTDIR) => None,
            other => Some((layer, other)),
        };
        let (layer, file) = (0..).zip(&self.lowers).find_map(found)?;
        let st = stat(file.ok()?).ok()?;
        is_same(&merged, &st).then_some(Hint { layer, path, st })
    }
}

fn place(root: &OwnedFd, node: &Node) -> Option<PathBuf> {
    let root = std::fs::read_link(magic(root)).ok()?;
    let path = std::fs::read_link(magic(node)).ok()?;
    Some(path.strip_prefix(root).ok()?.to_owned())
}

fn look(folder: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(folder, path, flags, Mode::empty(), resolve)
}

/// Overlay may use an inode number's upper half to tell layers apart.
fn is_same(merged: &Statx, lower: &Statx) -> bool {
    let facts = |st: &Statx| {
        let (mtime, ctime) = (st.stx_mtime, st.stx_ctime);
        let times = (mtime.tv_sec, mtime.tv_nsec, ctime.tv_sec, ctime.tv_nsec);
        (st.stx_ino as u32, st.stx_size, st.stx_mode, st.stx_uid, st.stx_gid, times)
    };
    u32::from(lower.stx_mode) & libc::S_IFMT == libc::S_IFREG && facts(merged) == facts(lower)
}

impl Hint {
    /// Appends the hint: layer, size, time of change, path.
    pub(super) fn put(&self, answer: &mut Answer) {
        use std::os::unix::ffi::OsStrExt;
        let mtime = self.st.stx_mtime;
        answer.u64(self.st.stx_size).u64(mtime.tv_sec.cast_unsigned()).u32(mtime.tv_nsec).u32(self.layer);
        answer.bytes(self.path.as_os_str().as_bytes());
    }
}
