//! Pause and Resume: the freezer of the container's group.

use vmctr_proto::agent::ContainerRef;

use super::{Error, Result};
use crate::guest::Handle;
use crate::ids::ContainerId;

/// Stops all processes of a container.
pub async fn freeze(guest: Handle, container: ContainerRef) -> Result<()> {
    set_frozen(guest, &container, true).await
}

/// Lets them go on.
pub async fn thaw(guest: Handle, container: ContainerRef) -> Result<()> {
    set_frozen(guest, &container, false).await
}

async fn set_frozen(guest: Handle, container: &ContainerRef, frozen: bool) -> Result<()> {
    let id = ContainerId::parse(&container.container_id)?;
    let verb = if frozen { "paused" } else { "resumed" };
    let begun = id.clone();
    let cgroup = guest
        .call(move |guest| {
            let container = guest.container(&begun)?;
            let what = || format!("container {begun}");
            container.init.live().map_err(|source| Error::State { what: what(), verb, source })?;
            if container.deleting {
                return Err(Error::Busy { what: what(), verb, why: "it is being deleted" });
            }
            // From now on no exec starts; one would freeze half-built.
            container.frozen |= frozen;
            Ok(container.cgroup.clone())
        })
        .await?;
    let outcome = cgroup.set_frozen(frozen).await;
    let now = if outcome.is_ok() { frozen } else { !frozen };
    if outcome.is_err() {
        // A group that froze in part must not stay so.
        let _ = cgroup.set_frozen(now).await;
    }
    guest.call(move |guest| guest.container(&id).map(|container| container.frozen = now)).await?;
    Ok(outcome?)
}
