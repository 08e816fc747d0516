//! `vmctr union`: union mounts whose union is made by a helper VM. `vmctr mount`: the root of a running container.
//!
//! ```text
//!   mount   options ── check ─> Plan ──── Order ──socket──> vmctr union serve    owns a VM and its unions
//!                                          or ──stdin──> a new one
//!           container ─ check ─> Target ── Order ──stdin──> vmctr union serve    one per mounted container
//!                                 "ready" or why not <──────  locks ─ run directory
//!                                      union: share ─ port of the VM ─ agent: overlay ──┬─ streams ─ FUSE mount
//!                                      container: its shim ─ agent: its root ───────────┘
//!   umount  takes the mount away, which ends that process; removes what a killed one left
//!   ls, inspect   read the run directories
//! ```
//!
//! What is mounted stands in `mount.json` of its run directory, whose key comes from the mountpoint.

mod beside;
mod check;
mod helper;
mod list;
mod member;
mod mount;
mod mount8;
mod options;
mod order;
mod owner;
mod owners;
mod place;
mod ports;
mod record;
mod serve;
mod served;
mod table;
mod target;
mod umount;
mod users;

use std::ffi::OsString;

use vmctr_vmm::config::Config;

use super::{Context, config};
use crate::cli::{MountArgs, UnionUmount, UnionVerb};
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

/// `vmctr mount`.
pub async fn mount_container(context: &Context, config: &Config, args: &MountArgs) -> Outcome {
    mount::container(context, config, args).await
}

/// `vmctr umount`.
pub fn umount(config: &Config, args: &UnionUmount) -> Outcome {
    umount::run(config, args)
}

/// What mount(8) calls, for fstab as well.
pub fn mount_helper(args: impl Iterator<Item = OsString>) -> Outcome {
    match mount8::parse(args)? {
        Some(args) => mount::run(&config()?, &args),
        None => Ok(crate::failure::Verdict::Good),
    }
}
