//! What a thread gives up so that the file system treats what it does as another's doing.
//!
//! Invariant: IDs and capabilities are those of one thread, and back as they were when the guard goes.

use std::io;

use nix::unistd::{Gid, setfsgid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// While it lives, this thread's writes and truncations clear set-ID bits as another's would.
#[must_use]
pub(super) struct Unprivileged(CapabilitySets);

/// Gives up CAP_FSETID and root's group: a set-group-ID bit stays for members of the file's group.
/// Of the caller's groups only the first is known; members by another lose the bit.
pub(super) fn clearing_set_ids(gid: u32) -> rustix::io::Result<Unprivileged> {
    let before = rustix::thread::capabilities(None)?;
    let effective = before.effective & !CapabilitySet::FSETID;
    rustix::thread::set_capabilities(None, CapabilitySets { effective, ..before })?;
    setfsgid(Gid::from_raw(gid));
    Ok(Unprivileged(before))
}

impl Drop for Unprivileged {
    fn drop(&mut self) {
        setfsgid(Gid::from_raw(0));
        // Raising what is still permitted cannot fail.
        let _ = rustix::thread::set_capabilities(None, self.0);
    }
}

/// Takes back what lets this thread pass over permissions, which it lost with root's ID.
pub(super) fn pass_over_permissions() -> rustix::io::Result<()> {
    let before = rustix::thread::capabilities(None)?;
    let effective = before.effective | CapabilitySet::DAC_OVERRIDE;
    rustix::thread::set_capabilities(None, CapabilitySets { effective, ..before })
}

/// Leaves this thread no groups but root's, and nothing that lets it write past quotas or into reserved space.
pub(super) fn write_like_anybody() -> io::Result<()> {
    rustix::thread::set_thread_groups(&[])?;
    let before = rustix::thread::capabilities(None)?;
    let effective = before.effective & !CapabilitySet::SYS_RESOURCE;
    Ok(rustix::thread::set_capabilities(None, CapabilitySets { effective, ..before })?)
}
