//! Start: lets an init process run its program, or builds an exec.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use libcontainer::container::{Container as Stored, ContainerStatus};
use libcontainer::notify_socket::NOTIFY_FILE;
use libcontainer::oci_spec::runtime::Process;
use rustix::process::Pid;
use vmctr_proto::agent::{ProcessRef, StartReply};

use super::create::Launch;
use super::{Error, Result, blocking, io_error};
use crate::guest::{Guest, Handle, Helper, LookupError, Names, State, Verb};
use crate::ids::ProcessId;
use crate::runtime::STATE_DIR;
use crate::stdio::{Claim, Numbers};

/// Starts the process; returns once it runs its program.
pub async fn start(guest: Handle, process: ProcessRef) -> Result<StartReply> {
    let id = ProcessId::parse(&process.container_id, &process.exec_id)?;
    let pid = if id.exec.is_none() { init(&guest, id).await? } else { exec(&guest, id).await? };
    Ok(StartReply { pid: pid.as_raw_nonzero().get().unsigned_abs() })
}

fn not_started(id: &ProcessId) -> impl FnOnce(crate::guest::WrongState) -> Error {
    let what = id.to_string();
    move |source| Error::State { what, verb: "started", source }
}

async fn init(guest: &Handle, id: ProcessId) -> Result<Pid> {
    let begun = id.clone();
    let (pid, name, helper) = guest.call(move |guest| begin_init(guest, &begun)).await?;
    let dir = Path::new(STATE_DIR).join(name);
    let socket = dir.join(NOTIFY_FILE);
    let told = UnixStream::connect(&socket).and_then(|mut stream| stream.write_all(b"start container"));
    told.map_err(io_error("telling the init process to start"))?;
    helper.executed().await?;
    blocking(move || mark_running(&dir)).await?;
    guest.call(move |guest| guest.state(&id).map(State::started)).await?;
    Ok(pid)
}

fn begin_init(guest: &mut Guest, id: &ProcessId) -> Result<(Pid, String, Helper)> {
    let container = guest.container(&id.container)?;
    let pid = container.init.start().map_err(not_started(id))?;
    let missing = || Error::Lookup(LookupError::Missing(id.clone()));
    Ok((pid, container.name.clone(), container.starting.take().ok_or_else(missing)?))
}

/// libcontainer adds processes only to a container that its own record calls running.
fn mark_running(dir: &Path) -> Result<()> {
    // A process that ends while its record is compared with /proc fails the first look; the second sees its end.
    let load = || Stored::load(dir.to_owned());
    let mut stored = load().or_else(|_| load()).map_err(Error::Mark)?;
    // One that has ended meanwhile takes no more processes, and the record may say so.
    if stored.status() == ContainerStatus::Created {
        stored.set_status(ContainerStatus::Running).save().map_err(Error::Mark)?;
    }
    Ok(())
}

async fn exec(guest: &Handle, id: ProcessId) -> Result<Pid> {
    let begun = id.clone();
    let order = guest.call(move |guest| begin_exec(guest, &begun)).await?;
    let outcome = build(guest, order).await;
    guest.call(move |guest| adopt(guest, &id, outcome)).await
}

/// What it takes to build an exec.
struct Order {
    names: Names,
    numbers: Numbers,
    claim: Claim,
    process: Process,
}

fn begin_exec(guest: &mut Guest, id: &ProcessId) -> Result<Order> {
    let container = guest.container(&id.container)?;
    let busy = |why| Error::Busy { what: id.to_string(), verb: "started", why };
    if !matches!(container.init, State::Running(_)) {
        return Err(busy("its container does not run"));
    }
    if container.frozen || container.deleting {
        return Err(busy("its container is paused or being deleted"));
    }
    let missing = || Error::Lookup(LookupError::Missing(id.clone()));
    let exec = id.exec.as_ref().and_then(|exec| container.execs.get_mut(exec)).ok_or_else(missing)?;
    exec.state.prepare().map_err(not_started(id))?;
    let (numbers, claim) = exec.streams.take().ok_or_else(missing)?;
    let names = Names { container: container.name.clone(), process: exec.name.clone() };
    Ok(Order { names, numbers, claim, process: exec.process.clone() })
}

async fn build(guest: &Handle, order: Order) -> Result<(Launch, Pid)> {
    let Order { names, numbers, claim, process } = order;
    let host = claim.fulfilled().await?;
    let mut launch = Launch::prepare(guest, Verb::Exec, names, numbers.terminal, host, &process).await?;
    match launch.wait().await {
        Ok(pid) => Ok((launch, pid)),
        Err(error) => {
            guest.call(|guest| guest.reaper.helper_ends()).await;
            Err(error)
        }
    }
}

fn adopt(guest: &mut Guest, id: &ProcessId, outcome: Result<(Launch, Pid)>) -> Result<Pid> {
    let (launch, pid) = match outcome {
        Ok(built) => built,
        Err(error) => {
            if let Ok(state) = guest.state(id) {
                state.failed().map_err(not_started(id))?;
            }
            if let Ok(container) = guest.container(&id.container) {
                container.exited.notify_waiters();
            }
            return Err(error);
        }
    };
    let adopted = guest.adopt(id, pid, |state| state.running(pid));
    guest.reaper.helper_ends();
    adopted?;
    let container = guest.container(&id.container)?;
    if let Some(exec) = id.exec.as_ref().and_then(|exec| container.execs.get_mut(exec)) {
        exec.terminal = launch.master;
    }
    Ok(pid)
}
