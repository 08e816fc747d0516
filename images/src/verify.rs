//! Checks a commit: the stored layer, read again and put on the base, against what the container shows.
//!
//! ```text
//! stored layer ── apply ──> scratch folder (overlay form) ─┐
//!                                        base's folders  ──┴─ merged view ─┐
//!                                                                          ├─ compare ─> differences
//! guest's archive of its root, or the merged view of the folders ──────────┘
//! ```
//!
//! Invariant: nothing is mounted, and nothing is taken from the pass that wrote the layer but its digests.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::layer::{LayerInfo, LayerReader, ReadError};
use crate::path::TreePath;
use crate::tree::{ApplyError, CompareError, Difference, Form, Rules, Tree, apply, compare_by};
use crate::upper::{Consistency, Layers, Namespace, OpenError, Scope, Walk, WalkError};

/// Bytes of a layer or of a root at most: a sparse file may claim any size.
const LIMIT: u64 = 1 << 40;

/// More differences help nobody.
const MOST: usize = 100;

/// Why a commit cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The stored layer cannot be read.
    #[error("The stored layer cannot be read")]
    Read(#[from] ReadError),
    /// The stored layer cannot be applied.
    #[error("The stored layer cannot be applied")]
    Apply(#[from] ApplyError),
    /// The scratch folder or the base cannot be opened.
    #[error("The folders to compare cannot be opened")]
    Open(#[from] OpenError),
    /// A folder cannot be read.
    #[error("The folders to compare cannot be read")]
    Walk(#[from] WalkError),
    /// The trees cannot be compared.
    #[error("The image and the container cannot be compared")]
    Compare(#[from] CompareError),
}

/// What the container shows.
pub enum Live<'a> {
    /// The guest's archive of its root: hostile.
    Guest(Box<dyn Read + 'a>),
    /// Its folders.
    Folders(&'a Layers),
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Findings {
    /// The stored layer has another digest or diff ID than was announced.
    pub damaged: bool,
    /// How the image's root differs from the container's.
    pub differences: Vec<Difference>,
}

impl Findings {
    /// Whether the image shows what the container shows.
    pub fn is_good(&self) -> bool {
        !self.damaged && self.differences.is_empty()
    }
}

/// Applies the stored `layer` to the empty folder `scratch`; whether its bytes are those of `info`.
pub fn unpack(layer: impl Read, info: &LayerInfo, scratch: &Path) -> Result<bool, VerifyError> {
    let reader = LayerReader::new(layer, LIMIT)?;
    let found = apply(reader, scratch, Form::Overlay(Namespace::Trusted))?;
    Ok((found.digest, found.diff_id, found.size) == (info.digest, info.diff_id, info.size))
}

/// Compares `folders`, topmost first, with what the container shows at and beneath `within`. Times later than `clamp`
/// are equal to it.
pub fn differences(
    folders: &[PathBuf],
    live: Live<'_>,
    clamp: Option<i64>,
    within: &TreePath,
) -> Result<Vec<Difference>, VerifyError> {
    let layers = Layers::open(folders, Namespace::Trusted)?;
    let everything =
        |layers| Walk::new(layers, Scope::Everything, Consistency::Frozen, within.clone()).map(Box::new);
    let is = Tree::Folders(everything(&layers)?);
    let (should, attributes): (_, fn(&[u8]) -> bool) = match live {
        Live::Guest(archive) => {
            (Tree::Stream(Box::new(LayerReader::literal(archive, LIMIT)?)), passes_the_share)
        }
        Live::Folders(layers) => (Tree::Folders(everything(layers)?), |_| true),
    };
    Ok(compare_by(is, should, MOST, &Rules { clamp, attributes, within })?)
}

/// Attributes of a layer's files that the guest cannot see are no differences.
fn passes_the_share(name: &[u8]) -> bool {
    const ONES: [&[u8]; 3] =
        [b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"];
    name.starts_with(b"user.") || ONES.contains(&name)
}

/// A layer's blob in an archive of an image; `None` if it is not there.
pub fn blob_in_archive<R: Read>(
    archive: R,
    digest: &Digest,
) -> Result<Option<impl Read + use<R>>, ReadError> {
    let name = format!("blobs/sha256/{}", digest.hex());
    let mut entries = LayerReader::literal(archive, u64::MAX)?;
    while let Some(entry) = entries.next_item()? {
        if entry.path.as_bytes() == name.as_bytes() {
            return Ok(Some(entries));
        }
    }
    Ok(None)
}
