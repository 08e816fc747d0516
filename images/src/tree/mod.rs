//! Trees of files on the host: written beneath a folder, applied from a layer, compared.
//!
//! ```text
//! Walk  ─ new_folder ─┐
//!                     ├─ Target (beneath one root) ─> overlay form: whiteouts, opaque marks
//! Layer ─ apply ──────┘                            └> plain form: deletions are carried out
//! ```

mod apply;
mod compare;
mod new_folder;
mod remove;
mod target;

pub use apply::{ApplyError, apply};
pub use compare::{CompareError, Difference, How, Rules, Tree, compare, compare_by};
pub use new_folder::{NewFolder, NewFolderError, fill_folder, write_new_folder};
pub use target::{Form, TreeError};
