//! AddUnion, FlushUnion, RemoveUnion: a union of the host's folders, which the host mounts.

use std::time::Duration;

use tokio::time::timeout;
use vmctr_proto::agent::{AddUnionRequest, UnionRef};

use super::{Error, Result, blocking};
use crate::exports::Exports;
use crate::rootfs::{RootPlan, Upper};
use crate::unions::{self, Union};

/// What takes longer to let go waits for a share daemon that is gone, and does so for ever.
const REMOVE_TIME: Duration = Duration::from_secs(5);

/// Mounts share and overlay, and serves it.
pub async fn add_union(exports: Exports, request: AddUnionRequest) -> Result<()> {
    let union = Union::parse(request.port)?;
    let plan = RootPlan::overlay(&request.overlay.unwrap_or_default())?;
    if matches!(plan, RootPlan::Overlay { upper: Upper::Guest { .. }, .. }) {
        return Err(Error::Argument("a union's changes do not stay in the guest".to_owned()));
    }
    blocking(move || Ok(union.add(&exports, plan)?)).await
}

/// Writes everything that is dirty back to the host.
pub async fn flush_union(union: UnionRef) -> Result<()> {
    let union = Union::parse(union.port)?;
    blocking(move || Ok(union.flush()?)).await
}

/// Removes every trace of it.
pub async fn remove_union(exports: Exports, union: UnionRef) -> Result<()> {
    let union = Union::parse(union.port)?;
    let removed = timeout(REMOVE_TIME, blocking(move || Ok(union.remove(&exports)?))).await;
    removed.unwrap_or_else(|_| Err(unions::Error::Used(union.number()).into()))
}
