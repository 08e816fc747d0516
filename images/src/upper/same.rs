//! Whether an upper entry holds any change at all.
//!
//! A file that was changed and changed back is in the upper, yet says nothing new. Everything that
//! shows is compared, content last, so that only files whose metadata agree are ever read.

use rustix::fs::FileType;

use super::content::same_bytes;
use super::error::{At, WalkError};
use super::marks::{Marks, Namespace};
use super::view::Leaf;
use crate::beneath::Node;
use crate::path::TreePath;

/// Whether owner, permissions, times and attributes agree.
pub(super) fn same_metadata(
    one: &Node,
    other: &Node,
    namespace: Namespace,
    place: &TreePath,
) -> Result<bool, WalkError> {
    if one.stat.id == other.stat.id {
        return Ok(true);
    }
    if one.stat.kind != other.stat.kind || one.stat.meta != other.stat.meta {
        return Ok(false);
    }
    let own = |node: &Node| node.xattrs().map(|stored| Marks::split(stored, namespace).1).at(place);
    Ok(own(one)? == own(other)?)
}

/// Whether `leaf` shows exactly what `base` shows. A hard link never does: one in the upper is new, and
/// one in the base was broken when the file was copied up.
pub(super) fn same_leaf(
    leaf: &Leaf,
    base: &Leaf,
    namespace: Namespace,
    place: &TreePath,
) -> Result<bool, WalkError> {
    if leaf.node.stat.id == base.node.stat.id {
        return Ok(true);
    }
    let linked = leaf.node.stat.nlink > 1 || base.node.stat.nlink > 1;
    if linked || !same_metadata(&leaf.node, &base.node, namespace, place)? {
        return Ok(false);
    }
    match leaf.node.stat.kind {
        FileType::RegularFile => same_bytes(leaf.bytes(), base.bytes()).at(place),
        FileType::Symlink => Ok(leaf.node.read_link().at(place)? == base.node.read_link().at(place)?),
        FileType::CharacterDevice | FileType::BlockDevice => Ok(leaf.node.stat.rdev == base.node.stat.rdev),
        _ => Ok(true),
    }
}
