//! Uppers of overlays with an index: one name there may stand for others that are only in a lower layer.
//!
//! The overlay notes on an indexed inode how many links the container sees. When that is more than the
//! upper holds, changes are visible under names that the upper does not have: such an upper is refused.

use super::error::WalkError;
use super::marks::Marks;
use super::view::Found;
use crate::beneath::Node;
use crate::path::TreePath;

/// With an index, one name in the upper may stand for others that are only in a lower layer.
pub(super) fn check_index(
    node: &Node,
    marks: &Marks,
    base: &Found,
    path: &TreePath,
) -> Result<(), WalkError> {
    let Some(note) = marks.nlink.as_deref() else { return Ok(()) };
    let in_base = if let Found::Leaf(leaf) = base { Some(leaf.node.stat.nlink) } else { None };
    // The index itself is one of the upper inode's links.
    let told = i64::from(node.stat.nlink) - 1;
    match merged_nlink(note, node.stat.nlink, in_base) {
        Some(merged) if merged <= told => Ok(()),
        _ => Err(WalkError::Indexed(path.clone())),
    }
}

/// The number of links that the container sees: noted as `U` or `L` and the distance to the upper or
/// lower inode's own count.
fn merged_nlink(note: &[u8], upper: u32, lower: Option<u32>) -> Option<i64> {
    let (from, distance) = std::str::from_utf8(note).ok()?.split_at_checked(1)?;
    let own = match from {
        "U" => upper,
        "L" => lower?,
        _ => return None,
    };
    Some(i64::from(own) + distance.parse::<i64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::merged_nlink;

    #[test]
    fn the_overlays_notation_of_link_counts_is_read() {
        assert_eq!(merged_nlink(b"U+1", 2, None), Some(3));
        assert_eq!(merged_nlink(b"U-1", 2, None), Some(1));
        assert_eq!(merged_nlink(b"L+0", 2, Some(4)), Some(4));
        for bad in [b"".as_slice(), b"X+1", b"L+0", b"U", b"\xff"] {
            assert_eq!(merged_nlink(bad, 2, None), None);
        }
    }
}
