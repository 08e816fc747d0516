//! Blobs in containerd's content store.
//!
//! ```text
//! BlobSink (a thread that writes) ── bounded channel ──> Write stream ──> ingest ── commit(digest) ──> blob
//! ```
//!
//! The digest of a layer is known only at its end, so a blob is written under a reference of its own
//! and becomes visible under its digest by the commit, which containerd checks.

use std::collections::HashMap;
use std::io;

use containerd_client::services::v1::{
    AbortRequest, AddResourceRequest, InfoRequest, Resource, WriteAction, WriteContentRequest,
};
use containerd_client::tonic::{Code, Status};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio_stream::wrappers::ReceiverStream;

use super::{ContainerdError, Doing, Store};
use crate::digest::Digest;

/// Well below containerd's limit on messages.
const CHUNK: usize = 1 << 20;
/// Chunks on their way.
const QUEUE: usize = 4;

/// The writing end of a blob, for a thread that may block.
pub struct BlobSink {
    chunks: Sender<Vec<u8>>,
    buffer: Vec<u8>,
}

impl io::Write for BlobSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.chunks
            .blocking_send(chunk)
            .map_err(|_| io::Error::other("containerd ended the write of the blob"))
    }
}

/// The other end of a [`BlobSink`].
pub struct BlobSource(Receiver<Vec<u8>>);

/// A pipe for one blob.
pub fn pipe() -> (BlobSink, BlobSource) {
    let (chunks, source) = channel(QUEUE);
    (BlobSink { chunks, buffer: Vec::with_capacity(CHUNK) }, BlobSource(source))
}

/// A blob that is being written and has no digest yet.
pub struct Ingest<'a> {
    store: &'a Store,
    reference: String,
    requests: Sender<WriteContentRequest>,
    answers: containerd_client::tonic::Streaming<containerd_client::services::v1::WriteContentResponse>,
    offset: i64,
}

impl Store {
    /// Begins a blob.
    pub async fn begin(&self) -> Result<Ingest<'_>, ContainerdError> {
        let reference = self.unique();
        let (requests, stream) = channel(1);
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.clone(),
            ..WriteContentRequest::default()
        };
        // There is room for one, so this cannot wait.
        requests.send(first).await.map_err(|_| ContainerdError::Ended)?;
        let request = self.request(ReceiverStream::new(stream))?;
        let answers = self.client.content().write(request).await.doing("begin a blob")?.into_inner();
        let mut ingest = Ingest { store: self, reference, requests, answers, offset: 0 };
        ingest.answer().await.doing("begin a blob")?;
        Ok(ingest)
    }

    /// Stores a small blob.
    pub async fn put(
        &self,
        bytes: &[u8],
        labels: HashMap<String, String>,
    ) -> Result<Digest, ContainerdError> {
        let digest = Digest::of(bytes);
        let mut ingest = self.begin().await?;
        ingest.chunk(bytes.to_vec()).await?;
        ingest.commit(&digest, labels).await?;
        Ok(digest)
    }

    /// Whether a blob is there.
    pub async fn has(&self, digest: &Digest) -> Result<bool, ContainerdError> {
        let request = self.request(InfoRequest { digest: digest.to_string() })?;
        match self.client.content().info(request).await {
            Err(status) if status.code() == Code::NotFound => Ok(false),
            result => result.doing("look for a blob").map(|_| true),
        }
    }

    /// Protects a blob that was there before.
    async fn protect(&self, digest: &Digest) -> Result<(), ContainerdError> {
        let resource = Some(Resource { id: digest.to_string(), r#type: "content".into() });
        let request = self.request(AddResourceRequest { id: self.lease.clone(), resource })?;
        self.client.leases().add_resource(request).await.doing("protect a blob").map(drop)
    }
}

impl Ingest<'_> {
    /// Writes what comes until the other end closes.
    pub async fn take(&mut self, mut source: BlobSource) -> Result<(), ContainerdError> {
        while let Some(chunk) = source.0.recv().await {
            self.chunk(chunk).await?;
        }
        Ok(())
    }

    async fn chunk(&mut self, data: Vec<u8>) -> Result<(), ContainerdError> {
        let length = data.len() as i64;
        let request = WriteContentRequest {
            action: WriteAction::Write.into(),
            offset: self.offset,
            data,
            ..WriteContentRequest::default()
        };
        self.requests.send(request).await.map_err(|_| ContainerdError::Ended)?;
        self.answer().await.doing("write a blob")?;
        self.offset += length;
        Ok(())
    }

    /// Makes the blob visible under its digest.
    pub async fn commit(
        mut self,
        digest: &Digest,
        labels: HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let request = WriteContentRequest {
            action: WriteAction::Commit.into(),
            offset: self.offset,
            total: self.offset,
            expected: digest.to_string(),
            labels,
            ..WriteContentRequest::default()
        };
        self.requests.send(request).await.map_err(|_| ContainerdError::Ended)?;
        match self.answer().await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let store = self.store;
                self.abort().await?;
                store.protect(digest).await
            }
            result => result.doing("keep a blob"),
        }
    }

    /// Throws away what was written.
    pub async fn abort(self) -> Result<(), ContainerdError> {
        let Self { store, reference, requests, mut answers, .. } = self;
        // containerd holds the reference until it has seen the end of the stream.
        drop(requests);
        while let Ok(Some(_)) = answers.message().await {}
        let request = store.request(AbortRequest { r#ref: reference })?;
        match store.client.content().abort(request).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            result => result.doing("abort a blob").map(drop),
        }
    }

    async fn answer(&mut self) -> Result<(), Status> {
        let ended = || Status::unavailable("the stream ended");
        self.answers.message().await?.ok_or_else(ended).map(drop)
    }
}
