//! Pids and Stats: what a container's group holds and counts.

use vmctr_proto::agent::{ContainerRef, PidsReply, ProcessId as Listed, StatsReply};

use super::Result;
use crate::guest::Handle;
use crate::ids::ContainerId;

/// The container's processes, in the guest's numbers.
pub async fn pids(guest: Handle, container: ContainerRef) -> Result<PidsReply> {
    let id = ContainerId::parse(&container.container_id)?;
    guest
        .call(move |guest| {
            let container = guest.container(&id)?;
            let listed = container.cgroup.processes()?.into_iter().map(|pid| Listed {
                pid: pid.as_raw_nonzero().get().unsigned_abs(),
                exec_id: container.owner(pid).flatten().map(|exec| exec.to_string()).unwrap_or_default(),
            });
            Ok(PidsReply { processes: listed.collect() })
        })
        .await
}

/// The container's counters.
pub async fn stats(guest: Handle, container: ContainerRef) -> Result<StatsReply> {
    let id = ContainerId::parse(&container.container_id)?;
    guest.call(move |guest| Ok(guest.container(&id)?.cgroup.stats()?)).await
}
