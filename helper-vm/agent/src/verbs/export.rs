//! ExportContainer: a container's root that the host mounts, for as long as its init process lives and the host wants it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use vmctr_fileshare::export::guest::Gate;
use vmctr_proto::agent::{ContainerRef, ExportContainerReply};

use super::{Error, Result, blocking};
use crate::exports::{Exports, Lent};
use crate::guest::{Guest, Handle};
use crate::ids::ContainerId;
use crate::rootfs::ROOTFS;
use crate::runtime::container_dir;

/// How long the host has to connect to what it asked for.
const CONNECT_TIME: Duration = Duration::from_secs(30);

/// Serves the container's root: the agent's own mount of it, on which nothing of the container's is mounted.
pub async fn export_container(
    guest: Handle,
    exports: Exports,
    container: ContainerRef,
) -> Result<ExportContainerReply> {
    let id = ContainerId::parse(&container.container_id)?;
    let wanted = id.clone();
    let found = guest.call(move |guest| find(guest, &wanted)).await?;
    let (root, gate, adding) = (found.root(), Arc::clone(&found.gate), exports.clone());
    let lent = blocking(move || Ok(adding.add_container(&root, gate)?)).await?;
    let export = lent.number;
    tokio::spawn(Watch { guest, exports, id, found, lent }.run());
    Ok(ExportContainerReply { export })
}

/// A container with an init process.
struct Found {
    name: String,
    gate: Arc<Gate>,
    exited: Arc<Notify>,
}

impl Found {
    fn root(&self) -> PathBuf {
        container_dir(&self.name).join(ROOTFS)
    }
}

fn find(guest: &mut Guest, id: &ContainerId) -> Result<Found> {
    let container = guest.container(id)?;
    let (what, verb) = (|| format!("container {id}"), "exported");
    container.init.live().map_err(|source| Error::State { what: what(), verb, source })?;
    if container.deleting {
        return Err(Error::Busy { what: what(), verb, why: "it is being deleted" });
    }
    let (gate, exited) = (Arc::clone(&container.gate), Arc::clone(&container.exited));
    Ok(Found { name: container.name.clone(), gate, exited })
}

/// Ends an export when its container does, or when nobody came for it.
struct Watch {
    guest: Handle,
    exports: Exports,
    id: ContainerId,
    found: Found,
    lent: Lent,
}

impl Watch {
    async fn run(self) {
        let connected_by = Instant::now() + CONNECT_TIME;
        let mut awaited = true;
        loop {
            let exited = self.found.exited.notified();
            if !self.is_live().await {
                break;
            }
            tokio::select! {
                () = exited => {}
                () = self.lent.ended.notified() => return,
                () = sleep_until(connected_by), if awaited => {
                    awaited = false;
                    if !self.exports.is_used(self.lent.number) {
                        break;
                    }
                }
            }
        }
        self.exports.end(self.lent.number);
    }

    async fn is_live(&self) -> bool {
        let (id, name) = (self.id.clone(), self.found.name.clone());
        self.guest.call(move |guest| find(guest, &id).is_ok_and(|found| found.name == name)).await
    }
}
