//! Paths inside the guest that host and agent must agree on.

/// Where the agent mounts the virtiofs share. Below it: `lower/N`, `upper`, `work`, `vol/N`.
pub const SHARE_DIR: &str = "/run/vmctr/share";

/// virtiofs tag of the share.
pub const SHARE_TAG: &str = "vmctr";

/// Name of the upper folder in the share.
pub const UPPER: &str = "upper";

/// Name of the work folder in the share.
pub const WORK: &str = "work";

/// Name of a lower folder in the share; 0 is the topmost.
#[must_use]
pub fn lower(index: usize) -> String {
    format!("lower/{index}")
}

/// Where the agent mounts the share of a union; below it as in [`SHARE_DIR`].
#[must_use]
pub fn union_share(port: u32) -> String {
    format!("/run/vmctr/unions/{port}")
}

/// virtiofs tag of a union's share.
#[must_use]
pub fn union_tag(port: u32) -> String {
    format!("vmctr-{port}")
}
