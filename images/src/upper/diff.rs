//! What changed, path by path, as `docker diff` tells it.

use std::fmt;

use super::change::What;
use super::error::WalkError;
use super::walk::Walk;
use crate::path::TreePath;

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The base does not have it.
    Added,
    /// The base has something else there, or what is in the folder changed.
    Changed,
    /// Only the base has it.
    Deleted,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Added => "A",
            Self::Changed => "C",
            Self::Deleted => "D",
        })
    }
}

/// Tells every path that changed, in order but for what a replaced folder lost.
pub fn diff(walk: &mut Walk<'_>, tell: &mut dyn FnMut(Status, &TreePath)) -> Result<(), WalkError> {
    while let Some(change) = walk.next_change()? {
        match change.what {
            What::Opaque => walk.hidden_names()?.iter().for_each(|path| tell(Status::Deleted, path)),
            What::Whiteout => tell(Status::Deleted, &change.path),
            What::Entry(_) | What::Parent(_) if change.in_base => tell(Status::Changed, &change.path),
            What::Entry(_) | What::Parent(_) => tell(Status::Added, &change.path),
        }
    }
    Ok(())
}
