//! Which lower file of the host's an overlay's file is, as a hint to the host, which can then read it by itself.
//!
//! The overlay does not tell, so it is found by looking: the file's present path below the root, in the upper
//! folder (then it is no lower file) and in the lower ones from the top. What is found is believed only if it is
//! in all respects the same file. A renamed folder's files are at another path in the layer: no hint for those.
//! The host believes nothing of it either and looks for itself.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::message::Answer;
use super::nodes::{Node, magic, stat};
use crate::export::stat::attr;
use crate::export::wire::abi::Attr;
use crate::export::wire::codec::Put;

/// With more lower layers, looking for a folder in each of them costs more than it saves.
const MOST: usize = 64;

/// The folders that an overlay is made of.
#[derive(Debug)]
pub struct Layers {
    pub(super) upper: Option<OwnedFd>,
    lowers: Vec<OwnedFd>,
}

/// A folder of the union, as the layers have it: those that do.
#[derive(Debug)]
pub(super) struct Parts {
    /// Below the layers' roots.
    pub(super) path: PathBuf,
    upper: Option<OwnedFd>,
    lowers: Vec<(u16, OwnedFd)>,
    /// The folder is one layer's and no other's, so that all that is in it is.
    pub(super) only: Option<u16>,
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

    /// Finds the layers' folders behind the folder `node`, to tell where each of its files lies.
    pub(super) fn parts(&self, root: &OwnedFd, node: &Node) -> Option<Parts> {
        if self.lowers.len() > MOST {
            return None;
        }
        let path = place(root, node)?;
        // The layer's own root has an empty path, which openat2(2) does not take.
        let at = if path.as_os_str().is_empty() { Path::new(".") } else { &path };
        let there = |layer: &OwnedFd| match look(layer, at) {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            other => other.map(Some),
        };
        let upper = self.upper.as_ref().map(there).transpose().ok()?.flatten();
        let mut lowers = Vec::new();
        for (layer, lower) in (1..).zip(&self.lowers) {
            lowers.extend(there(lower).ok()?.map(|folder| (layer, folder)));
        }
        let only = match &lowers[..] {
            [(layer, folder)] if upper.is_none() => {
                let [merged, lower] = [stat(node).ok()?, stat(folder).ok()?];
                is_same(&merged, &lower).then_some(*layer)
            }
            _ => None,
        };
        Some(Parts { path, upper, lowers, only })
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
        (u32::from(st.stx_mode) & libc::S_IFMT == libc::S_IFREG && is_same(&merged, &st)).then_some(Hint {
            layer,
            path,
            st,
        })
    }
}

pub(super) fn place(root: &OwnedFd, node: &Node) -> Option<PathBuf> {
    let root = std::fs::read_link(magic(root)).ok()?;
    let path = std::fs::read_link(magic(node)).ok()?;
    Some(path.strip_prefix(root).ok()?.to_owned())
}

pub(super) fn look(folder: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(folder, path, flags, Mode::empty(), resolve)
}

impl Parts {
    /// The lower layer that a file of this folder lies in, or a folder of it whole, counted from 1; 0 if it is none
    /// that the host could read by itself.
    pub(super) fn layer(&self, name: &CStr, merged: &Attr) -> u16 {
        let is_folder = merged.kind() == libc::S_IFDIR;
        if !is_folder && (merged.kind() != libc::S_IFREG || merged.size == 0) {
            return 0;
        }
        if let Some(layer) = self.only {
            return layer;
        }
        if self.upper.as_ref().is_some_and(|upper| stat_at(upper, name) != Err(Errno::NOENT)) {
            return 0;
        }
        let mut found = self.lowers.iter().filter_map(|(layer, folder)| match stat_at(folder, name) {
            Err(Errno::NOENT) => None,
            other => Some((*layer, other)),
        });
        match found.next() {
            // What lies below a file is hidden, what lies below a folder is merged with it.
            Some((layer, Ok(lower))) if facts(merged) == facts(&lower) => {
                if is_folder && found.next().is_some() { 0 } else { layer }
            }
            _ => 0,
        }
    }
}

fn stat_at(folder: &OwnedFd, name: &CStr) -> rustix::io::Result<Attr> {
    let wanted = StatxFlags::BASIC_STATS;
    let st = rustix::fs::statx(folder, name, AtFlags::SYMLINK_NOFOLLOW, wanted)?;
    Ok(attr(&st, st.stx_ino))
}

fn is_same(merged: &Statx, lower: &Statx) -> bool {
    let [merged, lower] = [merged, lower].map(|st| attr(st, st.stx_ino));
    facts(&merged) == facts(&lower)
}

/// What tells files apart. Overlay may use an inode number's upper half to tell layers apart.
fn facts(of: &Attr) -> impl PartialEq {
    let times = (of.mtime, of.mtimensec, of.ctime, of.ctimensec);
    (of.ino as u32, of.size, of.mode, of.uid, of.gid, times)
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
