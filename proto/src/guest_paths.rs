//! Paths inside the guest that host and agent must agree on.

/// Where the agent mounts the virtiofs share. Below it: `lower/N`, `upper`, `work`, `vol/N`.
pub const SHARE_DIR: &str = "/run/vmctr/share";

/// virtiofs tag of the share.
pub const SHARE_TAG: &str = "vmctr";
