//! ReadUpper: what a container changed, when it keeps that in the guest.

use std::io::{self, BufWriter, Write};

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
    let id = ContainerId::parse(&container.container_id)?;
    let wanted = id.clone();
    let name = guest.call(move |guest| Ok::<_, Error>(guest.container(&wanted)?.name.clone())).await?;
    let upper = rootfs::guest_upper(&container_dir(&name)).ok_or_else(|| Error::Busy {
        what: format!("container {id}"),
        verb: "archived",
        why: "it keeps its changes on the host",
    })?;
    blocking(move || Ok(archive::write(&upper, BufWriter::with_capacity(CHUNK, Chunks(host)))?)).await
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
