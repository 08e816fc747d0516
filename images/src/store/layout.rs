//! An image layout folder, as the OCI image specification describes it.
//!
//! ```text
//! DIR/oci-layout            {"imageLayoutVersion":"1.0.0"}; locked while an image is added
//!     blobs/sha256/<hex>    written without a name, named when complete
//!     index.json            replaced last: from then on the image is there
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Map, Value, json};

use super::{At, StoreError, files};
use crate::config::Descriptor;
use crate::digest::{Digest, HashingWriter};

const MARKER: &str = "oci-layout";
const INDEX: &str = "index.json";
const BLOBS: &str = "blobs/sha256";
pub(super) const MARKER_TEXT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
const TAG: &str = "org.opencontainers.image.ref.name";

/// A layout, locked against other writers while it is open.
pub struct Layout {
    dir: PathBuf,
    blobs: PathBuf,
    _lock: File,
}

impl Layout {
    /// Opens the layout in `dir`, or makes one in an empty or missing folder.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let marker = dir.join(MARKER);
        std::fs::create_dir_all(dir).at(dir)?;
        if !marker.exists() {
            make(dir, &marker)?;
        }
        let lock = File::open(&marker).at(&marker)?;
        flock(&lock, FlockOperation::LockExclusive).at(&marker)?;
        check_version(dir, &marker)?;
        let blobs = dir.join(BLOBS);
        std::fs::create_dir_all(&blobs).at(&blobs)?;
        Ok(Self { dir: dir.to_owned(), blobs, _lock: lock })
    }

    /// A blob to be written and then kept.
    pub fn begin_blob(&self) -> Result<File, StoreError> {
        files::nameless(&self.blobs).at(&self.blobs)
    }

    /// Keeps a written blob under its digest.
    pub fn keep(&self, blob: &File, digest: &Digest) -> Result<(), StoreError> {
        let path = self.blobs.join(digest.hex());
        files::name(blob, &path).at(&path).map(drop)
    }

    /// Stores a small blob.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let mut blob = self.begin_blob()?;
        blob.write_all(bytes).at(&self.blobs)?;
        self.keep(&blob, &digest)?;
        Ok(digest)
    }

    /// Copies a blob from elsewhere and checks it.
    pub fn copy(&self, digest: &Digest, source: &mut dyn Read) -> Result<(), StoreError> {
        let mut blob = HashingWriter::new(self.begin_blob()?);
        io::copy(source, &mut blob).at(&self.blobs)?;
        let (blob, found, _) = blob.finish();
        match found == *digest {
            true => self.keep(&blob, digest),
            false => Err(StoreError::Damaged { expected: *digest, found }),
        }
    }

    /// Whether the blob is here.
    pub fn has(&self, digest: &Digest) -> bool {
        self.blobs.join(digest.hex()).is_file()
    }

    /// Opens a blob.
    pub fn blob(&self, digest: &Digest) -> Result<File, StoreError> {
        let path = self.blobs.join(digest.hex());
        File::open(&path).at(&path)
    }

    /// The manifest that `tag` names, or the only one if no tag is given.
    pub fn find(&self, tag: Option<&str>) -> Result<Option<Descriptor>, StoreError> {
        let manifests = self.manifests()?;
        let found = match tag {
            Some(tag) => manifests.iter().find(|manifest| tag_of(manifest) == Some(tag)),
            None => manifests.first().filter(|_| manifests.len() == 1),
        };
        let malformed = |source| StoreError::Malformed { path: self.dir.join(INDEX), source };
        found.map(|found| serde_json::from_value(found.clone()).map_err(malformed)).transpose()
    }

    /// Makes `manifest` an image of this layout, in place of the one with the same tag.
    pub fn publish(&self, manifest: &Descriptor, tag: Option<&str>) -> Result<(), StoreError> {
        files::sync_dir(&self.blobs).at(&self.blobs)?;
        let path = self.dir.join(INDEX);
        let mut manifests = self.manifests()?;
        let same = |old: &Value| match tag {
            Some(tag) => tag_of(old) == Some(tag),
            None => old["digest"] == json!(manifest.digest) && tag_of(old).is_none(),
        };
        manifests.retain(|old| !same(old));
        manifests.push(tagged(manifest, tag));
        let mut index = self.index()?;
        index.insert("schemaVersion".into(), json!(2));
        index.insert("manifests".into(), Value::Array(manifests));
        files::replace(&path, Value::Object(index).to_string().as_bytes()).at(&path)?;
        files::sync_dir(&self.dir).at(&self.dir)
    }

    fn manifests(&self) -> Result<Vec<Value>, StoreError> {
        Ok(match self.index()?.remove("manifests") {
            Some(Value::Array(manifests)) => manifests,
            _ => Vec::new(),
        })
    }

    fn index(&self) -> Result<Map<String, Value>, StoreError> {
        let path = self.dir.join(INDEX);
        match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Map::new()),
            Err(error) => Err(error).at(&path),
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| StoreError::Malformed { path, source })
            }
        }
    }
}

/// The index's entry of a manifest.
pub(super) fn tagged(manifest: &Descriptor, tag: Option<&str>) -> Value {
    let mut entry = json!(manifest);
    if let Some(tag) = tag {
        entry["annotations"] = json!({TAG: tag});
    }
    entry
}

fn tag_of(manifest: &Value) -> Option<&str> {
    manifest.get("annotations")?.get(TAG)?.as_str()
}

/// Begins a layout in a folder that holds nothing else.
fn make(dir: &Path, marker: &Path) -> Result<(), StoreError> {
    if std::fs::read_dir(dir).at(dir)?.next().is_some() {
        return Err(StoreError::NoLayout(dir.to_owned()));
    }
    let mut file = files::nameless(dir).at(dir)?;
    file.write_all(MARKER_TEXT.as_bytes()).at(marker)?;
    // Another commit may have been first; its marker says the same.
    files::name(&file, marker).at(marker).map(drop)
}

fn check_version(dir: &Path, marker: &Path) -> Result<(), StoreError> {
    let bytes = std::fs::read(marker).at(marker)?;
    let malformed = |source| StoreError::Malformed { path: marker.to_owned(), source };
    let value: Value = serde_json::from_slice(&bytes).map_err(malformed)?;
    match value["imageLayoutVersion"].as_str() {
        Some("1.0.0") => Ok(()),
        other => {
            let version = other.unwrap_or("none").chars().take(40).collect();
            Err(StoreError::Version { path: dir.to_owned(), version })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(text: &str) -> Descriptor {
        Descriptor::new(
            "application/vnd.oci.image.manifest.v1+json",
            Digest::of(text.as_bytes()),
            text.len() as u64,
        )
    }

    #[test]
    fn images_are_added_and_replaced_by_tag() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/layout");
        let layout = Layout::open(&path).unwrap();
        for (text, tag) in
            [("one", Some("a")), ("two", Some("b")), ("three", Some("a")), ("four", None), ("four", None)]
        {
            layout.put(text.as_bytes()).unwrap();
            layout.publish(&manifest(text), tag).unwrap();
        }
        drop(layout);
        let layout = Layout::open(&path).unwrap();
        assert_eq!(layout.find(Some("a")).unwrap().unwrap().digest, Digest::of(b"three"));
        assert_eq!(layout.find(Some("b")).unwrap().unwrap().digest, Digest::of(b"two"));
        assert_eq!(layout.find(Some("c")).unwrap(), None);
        assert_eq!(layout.manifests().unwrap().len(), 3);
        let mut text = String::new();
        layout.blob(&Digest::of(b"one")).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "one");
    }

    #[test]
    fn what_is_no_layout_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("letter"), "dear").unwrap();
        assert!(matches!(Layout::open(dir.path()), Err(StoreError::NoLayout(_))));
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
        assert!(matches!(Layout::open(dir.path()), Err(StoreError::Version { .. })));
    }

    #[test]
    fn a_blob_that_is_not_what_it_should_be_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let expected = Digest::of(b"right");
        assert!(matches!(layout.copy(&expected, &mut &b"wrong"[..]), Err(StoreError::Damaged { .. })));
        assert!(!layout.has(&expected));
        layout.copy(&expected, &mut &b"right"[..]).unwrap();
        assert!(layout.has(&expected));
    }
}
