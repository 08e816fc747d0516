//! What a layer cannot say, or other tools may not read, and is no error.

use std::fmt;

use crate::path::TreePath;

/// Something that a layer cannot say and that is no error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// A socket was left out.
    Socket(TreePath),
    /// An entry vanished while it was read.
    Vanished(TreePath),
    /// An attribute without a value is in the layer, but common readers of tar take that for its absence.
    EmptyXattr(TreePath, String),
    /// A folder lost an attribute; a layer tells what there is, and some tools keep what was there.
    LostXattr(TreePath, String),
    /// A file of a renamed folder shared its inode with files elsewhere in the base; in the image it is
    /// a file of its own.
    SplitLink(TreePath),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{path} is a socket and was left out"),
            Self::Vanished(path) => write!(f, "{path} vanished while it was read"),
            Self::EmptyXattr(path, name) => {
                write!(f, "{path} has the attribute {name} without a value, which other tools may leave out")
            }
            Self::SplitLink(path) => {
                write!(
                    f,
                    "{path} may have had hard links outside its renamed folder; it is a file of its own now"
                )
            }
            Self::LostXattr(path, name) => {
                write!(f, "{path} lost the attribute {name}, which other tools may keep from the base")
            }
        }
    }
}

/// More notes than anybody reads; further ones are only counted.
const MAX_NOTES: usize = 1000;

/// The notes of a walk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    /// The first of them.
    pub kept: Vec<Note>,
    /// How many more there were.
    pub more: u64,
}

impl Notes {
    pub(super) fn add(&mut self, note: Note) {
        match self.kept.len() < MAX_NOTES {
            true => self.kept.push(note),
            false => self.more += 1,
        }
    }
}
