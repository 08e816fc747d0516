//! Update: new limits of a container.

use vmctr_proto::agent::UpdateRequest;

use super::create::cpus;
use super::{Result, blocking};
use crate::guest::Handle;
use crate::ids::ContainerId;
use crate::spec;

/// Sets the limits that the request names.
pub async fn update(guest: Handle, request: UpdateRequest) -> Result<()> {
    let id = ContainerId::parse(&request.container_id)?;
    let resources = spec::resources(&request.resources, cpus())?;
    let cgroup =
        guest.call(move |guest| guest.container(&id).map(|container| container.cgroup.clone())).await?;
    // Lowering a memory limit makes the kernel reclaim first.
    blocking(move || Ok(cgroup.apply(&resources)?)).await
}
