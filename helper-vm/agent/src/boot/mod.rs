//! From the kernel's hand-over to a guest that can run containers.
//!
//! The initramfs is the kernel's rootfs, which nothing can pivot away from, so PID 1 first moves to a
//! tmpfs of its own: containers then leave it with pivot_root like on any host.
//!
//! ```text
//!   /            tmpfs, read-only in no container's view
//!     dev/       devtmpfs; pts, shm, mqueue below
//!     proc, sys  sys/fs/cgroup is cgroup2: agent/ (PID 1 and its helpers), vmctr/NAME (containers)
//!     run/vmctr/ share (virtiofs), containers/cN (bundles and roots)
//!     tmp
//! ```

mod cgroups;
pub mod console;
pub mod limits;
mod modules;
mod mounts;

use anyhow::Context;

/// Prepares the guest; called once, by PID 1, before there are threads.
pub fn boot() -> anyhow::Result<()> {
    mounts::early().context("mounting /proc, /sys and /dev")?;
    console::attach().context("opening the console")?;
    limits::set_up().context("changing kernel settings")?;
    modules::load_all().context("loading kernel modules")?;
    mounts::leave_rootfs().context("moving from the initramfs to a tmpfs")?;
    mounts::rest().context("mounting the guest's file systems")?;
    cgroups::set_up().context("setting up control groups")?;
    crate::sys::loopback_up().context("bringing the loopback interface up")
}
