//! Export: an overlay of the share's folders that the host mounts.

use vmctr_proto::agent::ExportRequest;

use super::{Error, Result, blocking};
use crate::exports::Exports;
use crate::rootfs::{RootPlan, Upper};

/// Mounts the overlay and serves it.
pub async fn export(exports: Exports, request: ExportRequest) -> Result<()> {
    let overlay = request.overlay.unwrap_or_default();
    let plan = RootPlan::overlay(&overlay)?;
    if matches!(plan, RootPlan::Overlay { upper: Upper::Guest { .. }, .. }) {
        return Err(Error::Argument("an export's changes do not stay in the guest".to_owned()));
    }
    blocking(move || Ok(exports.add(request.export, plan)?)).await
}
