//! Why an upper folder cannot be read.

use std::io;

use crate::path::TreePath;

/// Why an upper folder cannot be read; each names the place in the container.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// A system call failed.
    #[error("{path} cannot be read")]
    Read {
        /// Where.
        path: TreePath,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file or folder was written, replaced or removed meanwhile.
    #[error("{0} changed while it was read; pause the container or retry")]
    Changed(TreePath),
    /// A redirect attribute that the kernel would refuse as well.
    #[error("{0} has an overlayfs redirect that leads nowhere; the upper folder is damaged")]
    BadRedirect(TreePath),
    /// A file whose content should be in a lower layer and is not.
    #[error("{0} has its content in a lower layer that is missing (overlayfs metacopy)")]
    MissingData(TreePath),
    /// Hard links of a lower layer that changed together through the overlay's index.
    #[error(
        "{0} was changed together with hard links in a lower layer (overlayfs index=on), which an upper \
         folder alone does not show; copy the file over itself in the container, then retry"
    )]
    Indexed(TreePath),
    /// Deeper than any image.
    #[error("{0} is nested deeper than {MAX_DEPTH} folders")]
    TooDeep(TreePath),
    /// More names than can be sorted with bounded memory.
    #[error("{0} holds more than {MAX_NAMES} entries")]
    TooManyNames(TreePath),
    /// More unfinished hard link groups than are kept.
    #[error("{0} is one hard link too many: more than {MAX_LINK_BYTES} bytes of names are open")]
    TooManyLinks(TreePath),
}

/// Levels of folders; far beyond paths of 4 KiB.
pub(super) const MAX_DEPTH: usize = 4096;
/// Entries of one folder.
pub(super) const MAX_NAMES: u64 = 1 << 26;
/// Memory for the first paths of hard link groups that are not complete yet.
pub(super) const MAX_LINK_BYTES: usize = 256 << 20;

/// Puts the place to an error.
pub(super) trait At<T> {
    fn at(self, path: &TreePath) -> Result<T, WalkError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: &TreePath) -> Result<T, WalkError> {
        self.map_err(|source| WalkError::Read { path: path.clone(), source })
    }
}
