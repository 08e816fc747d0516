//! Pause and Resume: the freezer of the container's group, and the gate for what the host changes in its root.

use std::sync::Arc;
use std::time::Duration;

use vmctr_fileshare::export::guest::Gate;
use vmctr_proto::agent::ContainerRef;

use super::{Error, Result, blocking};
use crate::cgroup::Cgroup;
use crate::guest::{Guest, Handle};
use crate::ids::ContainerId;

/// How long a change that the host is making may take to end. Pausing has 10 s.
const GATE_TIME: Duration = Duration::from_secs(5);

/// What stands still.
struct Movers {
    cgroup: Cgroup,
    gate: Arc<Gate>,
}

/// Stops all processes of a container, and changes from the host.
pub async fn freeze(guest: Handle, container: ContainerRef) -> Result<()> {
    set_frozen(guest, &container, true).await
}

/// Lets them go on.
pub async fn thaw(guest: Handle, container: ContainerRef) -> Result<()> {
    set_frozen(guest, &container, false).await
}

async fn set_frozen(guest: Handle, container: &ContainerRef, frozen: bool) -> Result<()> {
    let id = ContainerId::parse(&container.container_id)?;
    let begun = id.clone();
    let movers = guest.call(move |guest| begin(guest, &begun, frozen)).await?;
    let outcome = if frozen { movers.stop().await } else { movers.go().await };
    let now = if outcome.is_ok() { frozen } else { !frozen };
    if outcome.is_err() {
        // What stopped in part must not stay so.
        let _ = if now { movers.stop().await } else { movers.go().await };
    }
    guest.call(move |guest| guest.container(&id).map(|container| container.frozen = now)).await?;
    outcome
}

fn begin(guest: &mut Guest, id: &ContainerId, frozen: bool) -> Result<Movers> {
    let verb = if frozen { "paused" } else { "resumed" };
    let container = guest.container(id)?;
    let what = || format!("container {id}");
    container.init.live().map_err(|source| Error::State { what: what(), verb, source })?;
    if container.deleting {
        return Err(Error::Busy { what: what(), verb, why: "it is being deleted" });
    }
    // From now on no exec starts; one would freeze half-built.
    container.frozen |= frozen;
    Ok(Movers { cgroup: container.cgroup.clone(), gate: Arc::clone(&container.gate) })
}

impl Movers {
    async fn stop(&self) -> Result<()> {
        let gate = Arc::clone(&self.gate);
        blocking(move || Ok(gate.shut(GATE_TIME)?)).await?;
        Ok(self.cgroup.set_frozen(true).await?)
    }

    async fn go(&self) -> Result<()> {
        self.cgroup.set_frozen(false).await?;
        self.gate.open();
        Ok(())
    }
}
