//! CreateExec: registers a further process; its start builds it.

use std::fs;

use libcontainer::oci_spec::runtime::Process;
use vmctr_proto::agent::CreateExecRequest;

use super::{Error, Result, io_error};
use crate::guest::{Exec, Guest, Handle, LookupError, State};
use crate::ids::ProcessId;
use crate::runtime::process_file;
use crate::spec;
use crate::stdio::Numbers;

/// Registers the process.
pub async fn register(guest: Handle, request: CreateExecRequest) -> Result<()> {
    let id = request.process.unwrap_or_default();
    let id = ProcessId::parse(&id.container_id, &id.exec_id)?;
    let numbers = Numbers::from(&request.stdio.unwrap_or_default());
    let process = spec::process(&request.spec, numbers.terminal)?;
    guest.call(move |guest| insert(guest, &id, numbers, process)).await
}

fn insert(guest: &mut Guest, id: &ProcessId, numbers: Numbers, process: Process) -> Result<()> {
    let exec = id.exec.clone().ok_or_else(|| Error::Argument("an exec needs an exec ID".to_owned()))?;
    let container = guest.containers.get_mut(&id.container);
    let container = container.ok_or_else(|| LookupError::Missing(ProcessId::init(&id.container)))?;
    if container.execs.contains_key(&exec) {
        return Err(LookupError::Exists(id.clone()).into());
    }
    if container.deleting {
        return Err(Error::Busy {
            what: id.to_string(),
            verb: "created",
            why: "its container is being deleted",
        });
    }
    let claim = guest.streams.claim(&numbers)?;
    let name = container.new_exec_name();
    let json =
        serde_json::to_vec(&process).map_err(|error| Error::Argument(format!("the process: {error}")))?;
    let file = process_file(&container.name, &name);
    fs::write(&file, json).map_err(io_error(file.display().to_string()))?;
    let streams = Some((numbers, claim));
    container.execs.insert(exec, Exec { name, state: State::Registered, streams, process, terminal: None });
    Ok(())
}
