//! Delete: forgets an exec, or ends a container and removes every trace of it.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use vmctr_proto::agent::ProcessRef;

use super::{Error, Result, blocking, io_error};
use crate::cgroup::Cgroup;
use crate::guest::{Guest, Handle, State};
use crate::ids::{ContainerId, ProcessId};
use crate::rootfs;
use crate::runtime::{STATE_DIR, console_socket, container_dir, process_file};

/// How long the reaper gets to see the ends of processes that the kernel has killed.
const REAP_TIME: Duration = Duration::from_secs(10);

/// Deletes a process.
pub async fn delete(guest: Handle, process: ProcessRef) -> Result<()> {
    let id = ProcessId::parse(&process.container_id, &process.exec_id)?;
    if id.exec.is_some() {
        return guest.call(move |guest| forget_exec(guest, &id)).await;
    }
    let container = id.container;
    let begun = container.clone();
    let (name, exited) = guest.call(move |guest| begin(guest, &begun)).await?;
    let outcome = end(&guest, &container, &name, &exited).await;
    let gone = outcome.is_ok();
    guest.call(move |guest| finish(guest, &container, gone)).await;
    outcome
}

fn forget_exec(guest: &mut Guest, id: &ProcessId) -> Result<()> {
    let state = *guest.state(id)?;
    if !state.is_over() {
        let why = "it has not ended";
        return Err(Error::Busy { what: id.to_string(), verb: "deleted", why });
    }
    let container = guest.container(&id.container)?;
    if let Some(exec) = id.exec.as_ref().and_then(|exec| container.execs.remove(exec)) {
        // The terminal's socket is there only for a process with one; the directory goes in the end.
        let _ = fs::remove_file(process_file(&container.name, &exec.name));
        let _ = fs::remove_file(console_socket(&container.name, &exec.name));
    }
    Ok(())
}

fn begin(guest: &mut Guest, id: &ContainerId) -> Result<(String, Arc<Notify>)> {
    let container = guest.container(id)?;
    let busy = |why| Error::Busy { what: format!("container {id}"), verb: "deleted", why };
    if container.deleting {
        return Err(busy("it is being deleted already"));
    }
    if container.init == State::Preparing {
        return Err(busy("it is being created"));
    }
    container.deleting = true;
    Ok((container.name.clone(), container.exited.clone()))
}

fn finish(guest: &mut Guest, id: &ContainerId, gone: bool) {
    if gone {
        guest.containers.remove(id);
    } else if let Some(container) = guest.containers.get_mut(id) {
        // The host may try again.
        container.deleting = false;
    }
}

async fn end(guest: &Handle, id: &ContainerId, name: &str, exited: &Notify) -> Result<()> {
    all_reaped(guest, id, &Cgroup::of(name), exited).await?;
    tear_down(name).await
}

/// The exit events come before the container is forgotten, and no exec is half-built when it is.
async fn all_reaped(guest: &Handle, id: &ContainerId, cgroup: &Cgroup, exited: &Notify) -> Result<()> {
    let deadline = Instant::now() + REAP_TIME;
    loop {
        let next = exited.notified();
        // Each time anew: an exec may have joined the group meanwhile.
        cgroup.kill()?;
        let asked = id.clone();
        if guest.call(move |guest| guest.container(&asked).map(|container| container.is_dead())).await? {
            return Ok(());
        }
        if timeout_at(deadline, next).await.is_err() {
            let why = "its processes have not ended";
            return Err(Error::Busy { what: format!("container {id}"), verb: "deleted", why });
        }
    }
}

/// Ends what is left in the group and removes the container's files and mounts; also for one that was
/// never finished.
pub async fn tear_down(name: &str) -> Result<()> {
    let cgroup = Cgroup::of(name);
    cgroup.kill_and_wait().await?;
    let dir = container_dir(name);
    let state = Path::new(STATE_DIR).join(name);
    blocking(move || {
        rootfs::remove(&dir)?;
        match fs::remove_dir_all(&state) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error(state.display().to_string())(error));
            }
            _ => {}
        }
        Ok(cgroup.remove()?)
    })
    .await
}
