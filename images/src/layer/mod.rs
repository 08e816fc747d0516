//! OCI layers: a tar stream that says what one layer changes, plain or compressed.
//!
//! ```text
//! write:  Change ─ tar ─ sha256 (diff ID) ─ zstd | gzip | plain ─ sha256 (digest) ─> sink    one pass
//! read:   file ─ decompress ─ tar ─> Item           apply: Item ─> a folder, plain or in overlay form
//! ```

mod compress;
mod decode;
mod gzip;
mod header;
mod pax;
mod read;
mod write;

pub use compress::{Compression, CompressionError};
pub use decode::Checked;
pub use read::{Item, ItemKind, LayerReader, ReadError};
pub use write::{LayerError, LayerInfo, LayerOptions, LayerWriter, Totals};

pub(crate) use write::plain_header;

/// What a whiteout's name begins with.
pub(crate) const WHITEOUT: &[u8] = b".wh.";
/// The name that hides a folder's former content.
pub(crate) const OPAQUE: &[u8] = b".wh..wh..opq";
/// Tar's unit.
pub(crate) const BLOCK: usize = 512;
/// An attribute's name follows.
pub(crate) const XATTR_RECORD: &[u8] = b"SCHILY.xattr.";
