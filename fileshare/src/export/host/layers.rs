//! The lower layers' folders, without what is mounted below them.
//!
//! ```text
//!   /srv/low ── bind mount of it alone, in no namespace, private ──> what the guest sees of it by the share
//!   └── app/conf   another mount                                     what was in app/conf before
//! ```
//!
//! Invariants:
//! 1. No way leads from a layer to another mount: not to one that hangs, nor to the union itself.
//! 2. Nothing is written by it, nor are times of access.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::folder;
use crate::sys::{Reach, mount_setattr};

/// The layers, from the top. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Layers(Arc<[OwnedFd]>);

impl Layers {
    /// Opens the folders, whose paths have no symbolic links.
    pub(super) fn open(paths: &[PathBuf]) -> io::Result<Self> {
        paths.iter().map(|path| open(path)).collect::<io::Result<_>>().map(Self)
    }

    pub(super) fn get(&self, at: usize) -> Option<&OwnedFd> {
        self.0.get(at)
    }

    pub(super) fn all(&self) -> &[OwnedFd] {
        &self.0
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let tree = folder::clone_tree(folder::open(path, OFlags::PATH)?, Reach::One)?;
    mount_setattr(&tree, Reach::One, libc::MOUNT_ATTR_RDONLY, libc::MS_PRIVATE)?;
    Ok(tree)
}
