//! Signal: to one process, or to all of a container.

use vmctr_proto::agent::SignalRequest;

use super::{Error, Result, io_error};
use crate::guest::{Guest, Handle};
use crate::ids::ProcessId;
use crate::sys::{self, Signal};

/// Sends the signal.
pub async fn signal(guest: Handle, request: SignalRequest) -> Result<()> {
    let id = request.process.unwrap_or_default();
    let id = ProcessId::parse(&id.container_id, &id.exec_id)?;
    let signal = Signal::parse(request.signal)
        .ok_or_else(|| Error::Argument(format!("signal {} does not exist", request.signal)))?;
    guest.call(move |guest| send(guest, &id, signal, request.all)).await
}

fn send(guest: &mut Guest, id: &ProcessId, signal: Signal, all: bool) -> Result<()> {
    let state = *guest.state(id)?;
    if all {
        return Ok(guest.container(&id.container)?.cgroup.signal(signal)?);
    }
    // Its number is its own until it is reaped, which only the actor does.
    let pid =
        state.live().map_err(|source| Error::State { what: id.to_string(), verb: "signalled", source })?;
    sys::kill(pid, signal).map_err(io_error(format!("signalling {id}")))
}
