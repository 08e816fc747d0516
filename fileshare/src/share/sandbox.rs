//! What the daemon may do: its namespaces, its capabilities, its system calls.
//!
//! ```text
//!   start (root, host's namespaces)
//!     │ isolate()    own mount (private), pid (for children), net, ipc, uts namespaces
//!     │ fork         the child is PID 1 of its namespace
//!     │ confine()    capabilities down to a set, bounding set emptied to it, no_new_privs, seccomp
//!   serve
//! ```
//!
//! Why the server keeps CAP_SYS_ADMIN: the overlay in the guest stores its marks in `trusted.overlay.*` of the
//! upper folder, and the host's tools look for them there. The kernel wants the capability in the initial user
//! namespace for that, so the server cannot live in a user namespace of its own. [`super::seccomp`] takes away
//! all else that the capability allows.

use std::io;

use nix::sched::CloneFlags;
use rustix::mount::MountPropagationFlags;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::seccomp::{self, FilterError};

/// What serving files on behalf of any guest user takes.
const SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_ADMIN);

/// The process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No right to make namespaces.
    #[error("cannot create namespaces; vmctr-fsd must be started as root with CAP_SYS_ADMIN")]
    Namespaces(#[source] io::Error),
    /// The mounts could not be made private.
    #[error("cannot make the mount namespace private")]
    Propagation(#[source] io::Error),
    /// The groups of the caller stayed.
    #[error("cannot drop supplementary groups")]
    Groups(#[source] io::Error),
    /// The capabilities could not be reduced.
    #[error("cannot reduce capabilities")]
    Capabilities(#[source] io::Error),
    /// No filter.
    #[error(transparent)]
    Seccomp(#[from] FilterError),
}

/// Who gets confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Waits for the server: needs no capability.
    Supervisor,
    /// Serves the guest.
    Server,
}

/// Leaves the host's namespaces. The PID namespace holds for children only.
pub(super) fn isolate() -> Result<(), SandboxError> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    nix::sched::unshare(flags).map_err(|errno| SandboxError::Namespaces(errno.into()))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(|errno| SandboxError::Propagation(errno.into()))
}

/// Gives up all rights that `role` does not need, for good.
pub(super) fn confine(role: Role) -> Result<(), SandboxError> {
    let keep = match role {
        Role::Supervisor => CapabilitySet::empty(),
        Role::Server => SERVER,
    };
    nix::unistd::setgroups(&[]).map_err(|errno| SandboxError::Groups(errno.into()))?;
    reduce_capabilities(keep).map_err(SandboxError::Capabilities)?;
    Ok(seccomp::install()?)
}

fn reduce_capabilities(keep: CapabilitySet) -> io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    // Bits that the running kernel does not know end the walk: they follow the ones it does.
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) if !keep.contains(capability) => {
                rustix::thread::remove_capability_from_bounding_set(capability)?;
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}
