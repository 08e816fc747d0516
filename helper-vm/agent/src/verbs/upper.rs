//! ReadUpper and ReadMerged: folders of a container as archives: what it changed, when it keeps that in the
//! guest, and its root as a whole.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use tokio::sync::mpsc;
use tonic::Status;
use vmctr_proto::agent::{ContainerRef, UpperChunk};

use super::{Error, Result, blocking};
use crate::archive;
use crate::guest::Handle;
use crate::ids::ContainerId;
use crate::rootfs;
use crate::runtime::container_dir;

/// Bytes in one message.
const CHUNK: usize = 256 * 1024;

/// Where the pieces go.
pub type UpperSender = mpsc::Sender<std::result::Result<UpperChunk, Status>>;

/// Sends the container's guest-side upper folder, as an archive.
pub async fn read_upper(guest: Handle, container: ContainerRef, host: UpperSender) -> Result<()> {
    let (id, dir) = find(guest, container).await?;
    let upper = rootfs::guest_upper(&dir).ok_or_else(|| Error::Busy {
        what: format!("container {id}"),
        verb: "archived",
        why: "it keeps its changes on the host",
    })?;
    send(upper, None, host).await
}

/// Sends the container's root, as an archive: the agent's own mount of it, on which nothing else is mounted.
pub async fn read_merged(guest: Handle, container: ContainerRef, host: UpperSender) -> Result<()> {
    let (_, dir) = find(guest, container).await?;
    send(dir.join(rootfs::ROOTFS), rootfs::guest_upper(&dir), host).await
}

async fn find(guest: Handle, container: ContainerRef) -> Result<(ContainerId, PathBuf)> {
    let id = ContainerId::parse(&container.container_id)?;
    let wanted = id.clone();
    let name = guest.call(move |guest| Ok::<_, Error>(guest.container(&wanted)?.name.clone())).await?;
    Ok((id, container_dir(&name)))
}

async fn send(folder: PathBuf, upper: Option<PathBuf>, host: UpperSender) -> Result<()> {
    let out = BufWriter::with_capacity(CHUNK, Chunks(host));
    blocking(move || Ok(archive::write(&folder, upper.as_deref(), out)?)).await
}

/// Each write becomes one message.
struct Chunks(UpperSender);

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(CHUNK)];
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(UpperChunk { data: piece.to_vec() })).map_err(gone)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
