//! What an overlay's upper folder says has changed, read without mounting an overlay.
//!
//! ```text
//! upper ──┐  View: the folders of all layers     Walk: one Change after the other,
//! lower 0 ├─ that one merged folder consists of ─ sorted, bounded in memory ──> layer, new folder, diff
//! lower n ┘  (whiteouts, opaque, redirects)
//! ```
//!
//! The upper is hostile: it is only opened through `beneath`, it may change at any time, and
//! its names, links, depth and attributes are all bounded.

mod change;
mod content;
mod diff;
mod error;
mod index;
mod links;
mod marks;
mod names;
mod note;
mod same;
mod view;
mod walk;

pub use change::{Change, Consistency, Entry, EntryKind, Scope, What};
pub use content::{Content, ContentReader, Piece};
pub use diff::{Status, diff};
pub use error::WalkError;
pub use marks::Namespace;
pub use note::{Note, Notes};
pub use view::{Layers, OpenError};
pub use walk::Walk;

pub(crate) use marks::{escape, is_content};
