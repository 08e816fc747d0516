//! CreateContainer: the bundle, the group, the streams, then the helper.

use std::fs;
use std::sync::Arc;

use libcontainer::oci_spec::runtime::{Process, Spec};
use prost::Message;
use rustix::process::Pid;
use vmctr_proto::agent::{CreateContainerRequest, Root};

use super::terminal::{self, size};
use super::{Error, Result, delete, io_error};
use crate::cgroup::Cgroup;
use crate::guest::{Container, Guest, Handle, Helper, LookupError, Names, Verb};
use crate::ids::{ContainerId, ProcessId};
use crate::network::Network;
use crate::rootfs::RootPlan;
use crate::runtime::{ROOT_FILE, container_dir};
use crate::spec::{self, Place};
use crate::stdio::process::{HostEnds, connect_pipes, no_streams};
use crate::stdio::{Claim, Numbers};

/// Name of the init process among its container's files.
const INIT: &str = "init";

/// Builds the container; its init process then waits for the start.
pub async fn create(guest: Handle, request: CreateContainerRequest) -> Result<()> {
    let id = ContainerId::parse(&request.container_id)?;
    RootPlan::parse(request.root.as_ref())?;
    let numbers = Numbers::from(&request.stdio.unwrap_or_default());
    let begun = id.clone();
    let (name, claim) = guest.call(move |guest| begin(guest, &begun, &numbers)).await?;
    let outcome = build(&guest, &id, &name, &numbers, claim, &request).await;
    if outcome.is_err() {
        // What is left of it, the next attempt must not find; the first error is the one to tell.
        let _ = delete::tear_down(&name).await;
        guest.call(move |guest| drop(guest.containers.remove(&id))).await;
    }
    outcome
}

fn begin(guest: &mut Guest, id: &ContainerId, numbers: &Numbers) -> Result<(String, Claim)> {
    if guest.containers.contains_key(id) {
        return Err(LookupError::Exists(ProcessId::init(id)).into());
    }
    let claim = guest.streams.claim(numbers)?;
    let name = guest.new_name();
    guest.containers.insert(id.clone(), Container::new(name.clone()));
    Ok((name, claim))
}

async fn build(
    guest: &Handle,
    id: &ContainerId,
    name: &str,
    numbers: &Numbers,
    claim: Claim,
    request: &CreateContainerRequest,
) -> Result<()> {
    let cgroup = Cgroup::of(name);
    let place = Place { cgroup: &cgroup, terminal: numbers.terminal, cpus: cpus() };
    let mut spec = spec::container(&request.spec, &place)?;
    // Kept until the container is in it.
    let (network, last) = guest.call(|guest| (guest.network.take(), guest.devices.clone())).await;
    spec::use_network(&mut spec, || network.as_ref().map(Network::path));
    write_bundle(name, &spec, request.root.as_ref())?;
    cgroup.create()?;
    let linux = spec.linux().as_ref().ok_or(spec::Error::Missing("linux"))?;
    let devices = cgroup.restrict_devices(linux, last)?;
    guest.call(|guest| guest.devices = Some(devices)).await;
    let process = spec.process().as_ref().ok_or(spec::Error::Missing("process"))?;
    let names = Names { container: name.to_owned(), process: INIT.to_owned() };
    let host = claim.fulfilled().await?;
    let mut launch = Launch::prepare(guest, Verb::Create, names, numbers.terminal, host, process).await?;
    let outcome = launch.wait().await;
    drop(network);
    let id = ProcessId::init(id);
    guest.call(move |guest| adopt(guest, &id, launch, outcome)).await
}

fn write_bundle(name: &str, spec: &Spec, root: Option<&Root>) -> Result<()> {
    let dir = container_dir(name);
    fs::create_dir_all(&dir).map_err(io_error(dir.display().to_string()))?;
    let config = serde_json::to_vec(spec).map_err(|error| Error::Argument(format!("the spec: {error}")))?;
    let write = |file: &str, bytes: &[u8]| fs::write(dir.join(file), bytes).map_err(io_error(file));
    write("config.json", &config)?;
    write(ROOT_FILE, &root.cloned().unwrap_or_default().encode_to_vec())
}

fn adopt(guest: &mut Guest, id: &ProcessId, launch: Launch, outcome: Result<Pid>) -> Result<()> {
    let adopted = outcome.and_then(|pid| {
        guest.watch_oom(&id.container)?;
        guest.adopt(id, pid, |state| state.created(pid))?;
        let container = guest.container(&id.container)?;
        container.terminal = launch.master;
        container.starting = Some(launch.helper);
        Ok(())
    });
    guest.reaper.helper_ends();
    adopted
}

/// A helper at work together with the terminal that it may send.
pub struct Launch {
    /// The helper.
    pub helper: Helper,
    /// The terminal's master, once [`wait`](Self::wait) has returned.
    pub master: Option<Arc<std::os::fd::OwnedFd>>,
    terminal: Option<terminal::Awaited>,
}

impl Launch {
    /// Connects the streams and spawns the helper. The reaper expects an end of it from here on.
    pub async fn prepare(
        guest: &Handle,
        verb: Verb,
        names: Names,
        terminal: bool,
        host: HostEnds,
        process: &Process,
    ) -> Result<Self> {
        let user = process.user().uid();
        let (ends, terminal) = if terminal {
            let awaited = terminal::Awaited::bind(&names, host, size(process))?;
            (no_streams().map_err(io_error("/dev/null"))?, Some(awaited))
        } else {
            (connect_pipes(host, user).map_err(io_error("connecting standard streams"))?, None)
        };
        let with_terminal = terminal.is_some();
        let helper = guest
            .call(move |guest| {
                let helper = Helper::spawn(verb, &names, with_terminal, ends)?;
                guest.reaper.helper_begins();
                Ok(helper)
            })
            .await
            .map_err(io_error("starting the runtime process"))?;
        Ok(Self { helper, master: None, terminal })
    }

    /// Waits for the process, and for its terminal.
    pub async fn wait(&mut self) -> Result<Pid> {
        let pid = self.helper.ready().await?;
        if let Some(terminal) = self.terminal.take() {
            self.master = Some(terminal.connect().await?);
        }
        Ok(pid)
    }
}

/// The guest's CPUs.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
