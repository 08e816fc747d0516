//! `vmctr union`: union mounts whose union is made by a helper VM.
//!
//! ```text
//!   mount   options ─ check ─> Plan ──stdin──> vmctr union serve       one background process per union
//!                                 <──stdout── "ready" or why not         locks ─ run directory ─ share ─ VM
//!                                                                        agent: overlay ─ streams ─ FUSE mount
//!   umount  takes the mount away, which ends that process; removes what a killed one left
//!   ls, inspect   read the run directories
//! ```
//!
//! What a union is stands in `union.json` of its run directory, whose key comes from the mountpoint.

mod check;
mod helper;
mod list;
mod locks;
mod mount;
mod options;
mod record;
mod serve;
mod umount;

use std::ffi::OsString;

use super::{Context, config};
use crate::cli::UnionVerb;
use crate::failure::Outcome;

/// Does what the verb says.
pub async fn run(context: &Context, verb: UnionVerb) -> Outcome {
    let config = config()?;
    match verb {
        UnionVerb::Mount(args) => mount::run(&config, &args),
        UnionVerb::Umount(args) => umount::run(&config, &args),
        UnionVerb::Ls => list::list(context, &config),
        UnionVerb::Inspect { mountpoint } => list::inspect(context, &config, &mountpoint),
        UnionVerb::Serve => serve::run(&config).await,
    }
}

/// What mount(8) and fstab call: `mount.fuse.vmctr SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS] ...`.
pub fn mount_helper(args: impl Iterator<Item = OsString>) -> Outcome {
    match mount::helper_args(args)? {
        Some(args) => mount::run(&config()?, &args),
        None => Ok(crate::failure::Verdict::Good),
    }
}
