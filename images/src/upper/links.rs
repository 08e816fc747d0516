//! Hard links: which inode was already told, and under which path.
//!
//! Invariant: the first path of a group is the one that carries content; a group is forgotten once all
//! its links were seen, so memory is bounded by the groups that are open at a time.

use std::collections::HashMap;

use super::error::{MAX_LINK_BYTES, WalkError};
use crate::meta::{InodeId, Stat};
use crate::path::TreePath;

/// What a hash map's slot costs, roughly.
const OVERHEAD: usize = 96;

#[derive(Default)]
pub(super) struct Links {
    open: HashMap<InodeId, Group>,
    bytes: usize,
}

struct Group {
    first: TreePath,
    missing: u32,
    from_lower: bool,
}

impl Links {
    /// The path that was told first for this inode; `None` if this is the first one.
    pub(super) fn seen(
        &mut self,
        path: &TreePath,
        stat: &Stat,
        from_lower: bool,
    ) -> Result<Option<TreePath>, WalkError> {
        if stat.nlink < 2 {
            return Ok(None);
        }
        if let Some(group) = self.open.get_mut(&stat.id) {
            group.missing = group.missing.saturating_sub(1);
            if group.missing > 0 {
                return Ok(Some(group.first.clone()));
            }
            self.bytes -= cost(&group.first);
            return Ok(self.open.remove(&stat.id).map(|group| group.first));
        }
        self.bytes += cost(path);
        if self.bytes > MAX_LINK_BYTES {
            return Err(WalkError::TooManyLinks(path.clone()));
        }
        self.open.insert(stat.id, Group { first: path.clone(), missing: stat.nlink - 1, from_lower });
        Ok(None)
    }

    /// The first paths of a lower layer's groups of which not all links were told, in order.
    pub(super) fn split(&mut self) -> Vec<TreePath> {
        let open = std::mem::take(&mut self.open).into_values().filter(|group| group.from_lower);
        let mut paths: Vec<_> = open.map(|group| group.first).collect();
        paths.sort();
        paths
    }
}

fn cost(path: &TreePath) -> usize {
    path.as_bytes().len() + OVERHEAD
}
