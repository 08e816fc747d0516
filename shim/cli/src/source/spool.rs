//! The upper folder that a container keeps in its guest, copied to the host.
//!
//! The guest is hostile: what it sends is unpacked beneath one folder of ours, by the reader that bounds and
//! checks every header; it can fill no more of the disk than [`LIMIT`].

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Context as _;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tonic::Streaming;
use vmctr_images::layer::LayerReader;
use vmctr_images::tree::{Form, apply};
use vmctr_proto::control::ReadUpperReply;

use crate::control;
use crate::failure::Failure;

/// Name of the folder in the spool.
pub const UPPER: &str = "upper";

/// Largest archive: a guest's memory is smaller, unless it has files with large holes.
const LIMIT: u64 = 64 << 30;

/// Fetches the folder.
pub async fn fetch(socket: &Path) -> Result<TempDir, Failure> {
    let stream = control::read_upper(socket).await?;
    let archive = Archive::of(stream);
    Ok(spawn_blocking(move || unpack(archive)).await.context("unpacking was interrupted")??)
}

/// In /var/tmp: it is meant for large files, and its file system knows all attributes.
fn unpack(archive: Archive) -> anyhow::Result<TempDir> {
    let spool = tempfile::Builder::new().prefix("vmctr-upper-").tempdir_in("/var/tmp");
    let spool = spool.context("cannot make a folder in /var/tmp")?;
    let upper = spool.path().join(UPPER);
    fs::create_dir(&upper).with_context(|| format!("cannot make {}", upper.display()))?;
    let reader = LayerReader::literal(archive, LIMIT).context("The guest's changes cannot be read")?;
    apply(reader, &upper, Form::Literal).context("The guest's changes cannot be read")?;
    Ok(spool)
}

/// The pieces as one stream, for a thread that may block.
pub struct Archive {
    runtime: Handle,
    stream: Streaming<ReadUpperReply>,
    chunk: Vec<u8>,
    read: usize,
}

impl Archive {
    /// What a shim passes on.
    pub fn of(stream: Streaming<ReadUpperReply>) -> Self {
        Self { runtime: Handle::current(), stream, chunk: vec![], read: 0 }
    }
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.read == self.chunk.len() {
            let next = self.runtime.block_on(self.stream.message());
            match next.map_err(|status| io::Error::other(status.message().to_owned()))? {
                Some(reply) => (self.chunk, self.read) = (reply.data, 0),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.chunk.len() - self.read);
        buffer[..count].copy_from_slice(&self.chunk[self.read..self.read + count]);
        self.read += count;
        Ok(count)
    }
}
