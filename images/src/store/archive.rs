//! An image layout in one tar file, as `ctr image import` and `skopeo` read it.
//!
//! The file has no name until it is complete, and its bytes depend on the image only.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use serde_json::json;

use super::layout::{MARKER_TEXT, tagged};
use super::{At, StoreError, files};
use crate::config::Descriptor;
use crate::digest::{Digest, HashingWriter};
use crate::layer::{BLOCK, plain_header};

/// A blob and where its bytes come from.
pub type Blob<'a> = (Descriptor, &'a mut dyn Read);

/// Writes the image to `path`, which must not exist.
pub fn write_archive(
    path: &Path,
    manifest: &Descriptor,
    tag: Option<&str>,
    blobs: &mut [Blob<'_>],
) -> Result<(), StoreError> {
    if path.symlink_metadata().is_ok() {
        return Err(StoreError::Exists(path.to_owned()));
    }
    let dir = files::parent(path);
    let mut out = BufWriter::with_capacity(1 << 20, files::nameless(dir).at(dir)?);
    let index = json!({"schemaVersion": 2, "manifests": [tagged(manifest, tag)]}).to_string();
    entry(&mut out, path, "oci-layout", MARKER_TEXT.len() as u64, &mut MARKER_TEXT.as_bytes())?;
    entry(&mut out, path, "index.json", index.len() as u64, &mut index.as_bytes())?;
    for (descriptor, source) in blobs {
        let name = format!("blobs/sha256/{}", descriptor.digest.hex());
        let found = entry(&mut out, path, &name, descriptor.size, source)?;
        if found != descriptor.digest {
            return Err(StoreError::Damaged { expected: descriptor.digest, found });
        }
    }
    out.write_all(&[0; 2 * BLOCK]).at(path)?;
    finish(out, path, dir)
}

fn finish(out: BufWriter<File>, path: &Path, dir: &Path) -> Result<(), StoreError> {
    let file = out.into_inner().map_err(io::IntoInnerError::into_error).at(path)?;
    match files::name(&file, path).at(path)? {
        true => files::sync_dir(dir).at(dir),
        false => Err(StoreError::Exists(path.to_owned())),
    }
}

/// Writes one file and tells the digest of what came.
fn entry(
    out: &mut impl Write,
    path: &Path,
    name: &str,
    size: u64,
    source: &mut dyn Read,
) -> Result<Digest, StoreError> {
    out.write_all(&plain_header(name, size)).at(path)?;
    let mut hashed = HashingWriter::new(&mut *out);
    let copied = io::copy(&mut source.take(size), &mut hashed).at(path)?;
    let (_, digest, _) = hashed.finish();
    if copied < size {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).at(path);
    }
    io::copy(&mut io::repeat(0).take(size.wrapping_neg() % BLOCK as u64), out).at(path)?;
    Ok(digest)
}
