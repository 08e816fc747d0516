//! containerd's stores over gRPC: content, snapshots, images.
//!
//! ```text
//! lease (expires by itself) ── blob: layer ─ config ─ manifest ── snapshot of the layer ── image record
//!        └ protects all of it from garbage collection until the record refers to it; then it is deleted
//! ```
//!
//! Invariant: everything before the image record belongs to the lease. A process that dies leaves the
//! lease, which expires, and with it blobs, unfinished writes and the snapshot.

mod blob;
mod image;
mod read;
mod snapshot;

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use containerd_client::Client;
use containerd_client::services::v1::{CreateRequest, DeleteRequest};
use containerd_client::tonic::metadata::MetadataValue;
use containerd_client::tonic::{Request, Status};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub use blob::{BlobSink, BlobSource, Ingest, pipe};
pub use read::{BlobReader, Stored};
pub use snapshot::Snapshot;

use crate::digest::Digest;

/// How long a dead commit's leftovers stay.
const EXPIRES_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// Why containerd does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// A call failed.
    #[error("containerd cannot {doing}")]
    Call {
        /// What was asked.
        doing: &'static str,
        /// Its answer; boxed for its size.
        #[source]
        source: Box<Status>,
    },
    /// A name that cannot be sent.
    #[error("{0:?} cannot be a containerd namespace or lease")]
    Name(String),
    /// A snapshot whose mounts are not understood.
    #[error("The snapshotter {snapshotter} gives mounts of type {kind}; only overlay and bind are known")]
    Mounts {
        /// Which snapshotter.
        snapshotter: String,
        /// Its first mount's type.
        kind: String,
    },
    /// An image's document is not what it should be.
    #[error("The image's document {digest} is malformed")]
    Image {
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A manifest, index or config beyond all measure.
    #[error("The image's document {0} is larger than any should be")]
    TooLarge(Digest),
    /// The stream of a blob ended early.
    #[error("containerd ended the write of a blob without an answer")]
    Ended,
    /// The clock shows a time that has no form.
    #[error("The clock shows a time that cannot be written")]
    Clock(#[source] time::error::Format),
}

/// Puts what was asked to an answer.
trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, ContainerdError>;
}

impl<T> Doing<T> for Result<T, Status> {
    fn doing(self, doing: &'static str) -> Result<T, ContainerdError> {
        self.map_err(|source| ContainerdError::Call { doing, source: Box::new(source) })
    }
}

/// containerd in one namespace, under one lease.
pub struct Store {
    client: Client,
    namespace: String,
    lease: String,
}

impl Store {
    /// containerd in `namespace`, to read from.
    pub fn reader(client: Client, namespace: &str) -> Self {
        Self { client, namespace: namespace.to_owned(), lease: String::new() }
    }

    /// Takes a lease in `namespace`; [`Store::release`] gives it back.
    pub async fn lease(client: Client, namespace: &str) -> Result<Self, ContainerdError> {
        let expires = OffsetDateTime::from(SystemTime::now() + EXPIRES_AFTER);
        let expires = expires.format(&Rfc3339).map_err(ContainerdError::Clock)?;
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expires)]);
        let mut store = Self { client, namespace: namespace.to_owned(), lease: String::new() };
        let request = store.request(CreateRequest { id: store.unique(), labels })?;
        let lease = store.client.leases().create(request).await.doing("make a lease")?;
        store.lease = lease.into_inner().lease.map(|lease| lease.id).unwrap_or_default();
        Ok(store)
    }

    /// Gives the lease back, if there is one; what no image refers to may go then, and with `clean` it
    /// has gone afterwards.
    pub async fn release(&self, clean: bool) -> Result<(), ContainerdError> {
        if self.lease.is_empty() {
            return Ok(());
        }
        let request = self.request(DeleteRequest { id: self.lease.clone(), sync: clean })?;
        self.client.leases().delete(request).await.doing("delete a lease").map(drop)
    }

    /// A name that no other commit has.
    fn unique(&self) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        format!("vmctr-commit-{}-{}", std::process::id(), now.as_nanos())
    }

    fn request<T>(&self, message: T) -> Result<Request<T>, ContainerdError> {
        let mut request = Request::new(message);
        let value = |text: &String| {
            MetadataValue::try_from(text.as_str()).map_err(|_| ContainerdError::Name(text.clone()))
        };
        request.metadata_mut().insert("containerd-namespace", value(&self.namespace)?);
        if !self.lease.is_empty() {
            request.metadata_mut().insert("containerd-lease", value(&self.lease)?);
        }
        Ok(request)
    }
}
