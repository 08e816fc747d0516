//! What containerd has: an image's manifest and config, and its blobs.

use containerd_client::services::v1::{GetImageRequest, ReadContentRequest, ReadContentResponse};
use containerd_client::tonic::{Code, Streaming};
use serde::Deserialize;

use super::{ContainerdError, Doing, Store};
use crate::config::{Base, Descriptor};
use crate::digest::{DiffId, Digest};
use crate::store::StreamReader;

/// Largest manifest, index or config: containerd's own limit on manifests.
const JSON_MAX: usize = 8 << 20;

/// How deep indexes may refer to indexes.
const INDEX_DEPTH: usize = 4;

/// An image in containerd.
pub struct Stored {
    /// Its manifest, for this machine's platform.
    pub manifest: Descriptor,
    /// To build on.
    pub base: Base,
    /// The layers' diff IDs, lowest first.
    pub diff_ids: Vec<DiffId>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Manifest { config: Descriptor },
    Index { manifests: Vec<Descriptor> },
}

impl Store {
    /// Finds an image; `None` when there is none of this name, or its manifest or config is gone.
    pub async fn image(&self, name: &str) -> Result<Option<Stored>, ContainerdError> {
        let request = self.request(GetImageRequest { name: name.to_owned() })?;
        let record = match self.client.images().get(request).await {
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            result => result.doing("look for the image")?.into_inner().image,
        };
        let Some(target) = record.and_then(|image| image.target) else { return Ok(None) };
        let digest = target.digest.parse().map_err(|_| ContainerdError::Name(target.digest.clone()))?;
        let size = u64::try_from(target.size).unwrap_or_default();
        self.resolve(Descriptor::new(target.media_type, digest, size)).await
    }

    /// Follows indexes to the manifest for this machine.
    async fn resolve(&self, mut descriptor: Descriptor) -> Result<Option<Stored>, ContainerdError> {
        for _ in 0..INDEX_DEPTH {
            let Some(bytes) = self.json(&descriptor.digest).await? else { return Ok(None) };
            match parse(&bytes, &descriptor.digest)? {
                Document::Manifest { config } => return self.stored(descriptor, &bytes, &config).await,
                Document::Index { manifests } => match for_this_machine(manifests) {
                    Some(next) => descriptor = next,
                    None => return Ok(None),
                },
            }
        }
        Ok(None)
    }

    async fn stored(
        &self,
        manifest: Descriptor,
        bytes: &[u8],
        config: &Descriptor,
    ) -> Result<Option<Stored>, ContainerdError> {
        let Some(config) = self.json(&config.digest).await? else { return Ok(None) };
        let base = Base::parse(&config, bytes)
            .map_err(|source| ContainerdError::Image { digest: manifest.digest, source: Box::new(source) })?;
        let diff_ids = base.diff_ids().to_vec();
        Ok(Some(Stored { manifest, base, diff_ids }))
    }

    async fn json(&self, digest: &Digest) -> Result<Option<Vec<u8>>, ContainerdError> {
        let Some(mut stream) = self.stream(digest).await? else { return Ok(None) };
        let mut bytes = Vec::new();
        while let Some(piece) = stream.message().await.doing("read a blob")? {
            bytes.extend_from_slice(&piece.data);
            if bytes.len() > JSON_MAX {
                return Err(ContainerdError::TooLarge(*digest));
            }
        }
        Ok(Some(bytes))
    }

    /// Opens a blob for a thread that may block; `None` if it is gone.
    pub async fn open(&self, digest: &Digest) -> Result<Option<BlobReader>, ContainerdError> {
        let stream = self.stream(digest).await?;
        Ok(stream.map(|stream| StreamReader::new(stream, |piece| piece.data)))
    }

    async fn stream(
        &self,
        digest: &Digest,
    ) -> Result<Option<Streaming<ReadContentResponse>>, ContainerdError> {
        if !self.has(digest).await? {
            return Ok(None);
        }
        let request = self.request(ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 })?;
        let stream = self.client.content().read(request).await.doing("read a blob")?;
        Ok(Some(stream.into_inner()))
    }
}

fn parse(bytes: &[u8], digest: &Digest) -> Result<Document, ContainerdError> {
    serde_json::from_slice(bytes)
        .map_err(|source| ContainerdError::Image { digest: *digest, source: Box::new(source) })
}

/// The entry for this machine; an index without platforms has one entry that counts.
fn for_this_machine(manifests: Vec<Descriptor>) -> Option<Descriptor> {
    let fits = |manifest: &Descriptor| match manifest.more.get("platform") {
        Some(platform) => {
            platform["os"] == "linux" && platform["architecture"] == crate::config::architecture()
        }
        None => true,
    };
    manifests.into_iter().find(fits)
}

/// A blob's bytes, for a thread that may block.
pub type BlobReader = StreamReader<ReadContentResponse>;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(text: &str, platform: &serde_json::Value) -> serde_json::Value {
        json!({"mediaType": "m", "digest": Digest::of(text.as_bytes()), "size": 1, "platform": platform})
    }

    #[test]
    fn an_index_leads_to_this_machines_manifest() {
        let here = json!({"os": "linux", "architecture": crate::config::architecture()});
        let index = json!({"manifests": [
            entry("other", &json!({"os": "linux", "architecture": "s390x"})),
            entry("unknown", &json!({"os": "unknown", "architecture": "unknown"})),
            entry("ours", &here),
        ]});
        let Document::Index { manifests } = parse(index.to_string().as_bytes(), &Digest::of(b"")).unwrap()
        else {
            panic!("no index")
        };
        assert_eq!(for_this_machine(manifests).unwrap().digest, Digest::of(b"ours"));
    }

    #[test]
    fn what_is_neither_manifest_nor_index_is_refused() {
        assert!(parse(b"{}", &Digest::of(b"")).is_err());
    }
}
