//! ResizePty, and how a process's terminal comes to be.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use libcontainer::oci_spec::runtime::Process;
use rustix::termios::{Winsize, tcsetwinsize};
use vmctr_proto::agent::ResizePtyRequest;

use super::{Error, Result, io_error};
use crate::guest::{Handle, Names};
use crate::ids::ProcessId;
use crate::runtime::console_socket;
use crate::stdio::console::ConsoleSocket;
use crate::stdio::process::{HostEnds, connect_terminal};

/// A terminal that the process will send.
pub struct Awaited {
    socket: ConsoleSocket,
    host: HostEnds,
    size: Option<Winsize>,
}

impl Awaited {
    /// Prepares to receive it.
    pub fn bind(names: &Names, host: HostEnds, size: Option<Winsize>) -> Result<Self> {
        let path = console_socket(&names.container, &names.process);
        let socket = ConsoleSocket::bind(&path).map_err(io_error(path.display().to_string()))?;
        Ok(Self { socket, host, size })
    }

    /// Receives it and starts copying.
    pub async fn connect(self) -> Result<Arc<OwnedFd>> {
        let master = self.socket.receive().await.map_err(io_error("receiving the terminal"))?;
        if let Some(size) = self.size {
            tcsetwinsize(&master, size)
                .map_err(|error| Error::Io("the terminal's size".to_owned(), error.into()))?;
        }
        connect_terminal(self.host, &master).map_err(io_error("connecting the terminal"))?;
        Ok(Arc::new(master))
    }
}

/// The size that the spec asks for.
pub fn size(process: &Process) -> Option<Winsize> {
    let size = process.console_size()?;
    let fit = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
    Some(window(fit(size.width()), fit(size.height())))
}

/// Sets the size of a process's terminal.
pub async fn resize(guest: Handle, request: ResizePtyRequest) -> Result<()> {
    let id = request.process.unwrap_or_default();
    let id = ProcessId::parse(&id.container_id, &id.exec_id)?;
    let fit = |value: u32, what| {
        u16::try_from(value).map_err(|_| Error::Argument(format!("terminal {what} {value} is over 65535")))
    };
    let size = window(fit(request.width, "width")?, fit(request.height, "height")?);
    guest
        .call(move |guest| {
            guest.state(&id)?;
            let terminal = guest.container(&id.container)?.terminal(id.exec.as_deref());
            let terminal = terminal.ok_or_else(|| Error::Argument(format!("{id} has no terminal")))?;
            tcsetwinsize(&*terminal, size)
                .map_err(|error| Error::Io(format!("{id}'s terminal"), error.into()))
        })
        .await
}

fn window(width: u16, height: u16) -> Winsize {
    Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 }
}
