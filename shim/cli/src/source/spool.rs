//! The upper folder that a container keeps in its guest, copied to the host.
//!
//! The guest is hostile: what it sends is unpacked beneath one folder of ours, by the reader that bounds and
//! checks every header; it can fill no more of the disk than a few times its own memory.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use tokio::task::spawn_blocking;
use tonic::Streaming;
use vmctr_images::layer::LayerReader;
use vmctr_images::store::StreamReader;
use vmctr_images::tree::{Form, apply};
use vmctr_proto::control::ReadUpperReply;

use crate::control;
use crate::failure::Failure;
use crate::scratch::Scratch;

/// Name of the folder in the spool.
pub const UPPER: &str = "upper";

/// The archive is at most so many times the guest's memory, which is all that a guest can fill; the rest is for
/// headers, and for holes, which come as zeros.
const TIMES_MEMORY: u64 = 4;

/// What a shim passes on, for a thread that may block.
pub type Archive = StreamReader<ReadUpperReply>;

/// Reads what a shim passes on.
pub fn archive(stream: Streaming<ReadUpperReply>) -> Archive {
    StreamReader::new(stream, |reply| reply.data)
}

/// Fetches the folder.
pub async fn fetch(socket: &Path) -> Result<Scratch, Failure> {
    let limit = control::inspect(socket).await?.memory_bytes.saturating_mul(TIMES_MEMORY);
    let archive = archive(control::read_upper(socket).await?);
    Ok(spawn_blocking(move || unpack(archive, limit)).await.context("unpacking was interrupted")??)
}

fn unpack(archive: Archive, limit: u64) -> anyhow::Result<Scratch> {
    let spool = Scratch::new()?;
    let upper = spool.path().join(UPPER);
    fs::create_dir(&upper).with_context(|| format!("cannot make {}", upper.display()))?;
    let reader = LayerReader::literal(archive, limit).context("The guest's changes cannot be read")?;
    apply(reader, &upper, Form::Literal).context("The guest's changes cannot be read")?;
    Ok(spool)
}
