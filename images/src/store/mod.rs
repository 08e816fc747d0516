//! Where images go.
//!
//! Each store takes blobs first and the image's name last, so that whatever happens in between leaves
//! no image; blobs appear under their digests complete or not at all.

mod archive;
pub mod containerd;
mod files;
mod layout;
mod stream;

pub use archive::write_archive;
pub use layout::Layout;
pub use stream::StreamReader;

use std::io;
use std::path::PathBuf;

use crate::digest::Digest;

/// Why a store fails.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call on a file or folder of the store failed.
    #[error("{path:?} cannot be written")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A folder that is something else.
    #[error("{0:?} is no OCI layout and not empty; name another folder")]
    NoLayout(PathBuf),
    /// A layout of a later version.
    #[error("{path:?} has the layout version {version}; this program knows 1.0.0")]
    Version {
        /// Which layout.
        path: PathBuf,
        /// As it says.
        version: String,
    },
    /// The index is damaged.
    #[error("{path:?} is malformed")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The file exists.
    #[error("{0:?} exists; name a new file or remove it")]
    Exists(PathBuf),
    /// A blob is not what its digest says.
    #[error("The blob {expected} has the digest {found}; its source is damaged")]
    Damaged {
        /// What was asked for.
        expected: Digest,
        /// What came.
        found: Digest,
    },
}

/// Puts the place to an error.
trait At<T> {
    fn at(self, path: &std::path::Path) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, path: &std::path::Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Write { path: path.to_owned(), source: source.into() })
    }
}

/// A file without a name on the file system of `path`.
pub(crate) fn nameless_beside(path: &std::path::Path) -> Result<std::fs::File, StoreError> {
    let dir = files::parent(path);
    files::nameless(dir).at(dir)
}
