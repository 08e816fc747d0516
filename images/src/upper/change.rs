//! What a walk tells, and how it may be asked.

use super::content::Content;
use crate::meta::{Device, Meta, Xattrs};
use crate::path::TreePath;

/// Which part of the merged view is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// What the first layer changes against the others.
    Changes,
    /// All that the layers together show.
    Everything,
}

/// Whether somebody may be writing to the upper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Nobody: any change is an error.
    Frozen,
    /// What vanishes meanwhile is treated as if it had never been there.
    Live,
}

/// One statement of a layer.
#[derive(Debug)]
pub struct Change {
    /// Where.
    pub path: TreePath,
    /// What is there now.
    pub what: What,
    /// Whether the base shows something under this path.
    pub in_base: bool,
}

impl Change {
    /// The size of a regular file; of anything else nothing.
    pub fn bytes(&self) -> u64 {
        match &self.what {
            What::Entry(Entry { kind: EntryKind::File(content), .. }) => content.size(),
            _ => 0,
        }
    }
}

/// What a layer says of a path.
#[derive(Debug)]
pub enum What {
    /// It is this now.
    Entry(Entry),
    /// A folder that did not change itself, but holds changes.
    Parent(Entry),
    /// The base's entry is gone.
    Whiteout,
    /// Nothing of the base's folder shows; follows the folder's entry.
    Opaque,
}

/// An inode as the container sees it.
#[derive(Debug)]
pub struct Entry {
    /// Owner, permissions, time.
    pub meta: Meta,
    /// The container's own attributes.
    pub xattrs: Xattrs,
    /// What it is.
    pub kind: EntryKind,
}

/// What an inode is.
#[derive(Debug)]
pub enum EntryKind {
    /// A folder.
    Dir,
    /// A regular file.
    File(Content),
    /// A further name of an inode that came before.
    Link(TreePath),
    /// A symbolic link to these bytes.
    Symlink(Vec<u8>),
    /// A character device.
    Char(Device),
    /// A block device.
    Block(Device),
    /// A named pipe.
    Fifo,
}
