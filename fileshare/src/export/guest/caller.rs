//! Acting as the caller.
//!
//! What is made belongs to who asked for it: creation runs with the caller's file system IDs and umask. All
//! else runs as root. Whether the caller may do any of it was the host kernel's to decide, which knows the caller's
//! groups and capabilities (mount option `default_permissions`); it is not asked here again.
//!
//! Invariant: IDs, umask and capabilities are those of one thread ([`own_thread`]) and back as they were when
//! the guard goes.

use std::io;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::Mode;

use crate::export::privileges::{self, Unprivileged};

/// Who sent a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The one further group that matters to what is made, if any: the folder's, when the caller is in it.
    pub(super) groups: Vec<u32>,
}

/// Gives this thread a umask of its own, and no groups but root's.
pub(super) fn own_thread() -> io::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    rustix::thread::set_thread_groups(&[])?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// While it lives, this thread makes files as the caller does.
#[must_use]
pub(super) struct ActingAs {
    groups: bool,
}

impl Caller {
    pub(super) fn act(&self, umask: u32) -> rustix::io::Result<ActingAs> {
        let groups = !self.groups.is_empty();
        if groups {
            let groups: Vec<_> = self.groups.iter().map(|gid| rustix::thread::Gid::from_raw(*gid)).collect();
            rustix::thread::set_thread_groups(&groups)?;
        }
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
        setfsgid(Gid::from_raw(self.gid));
        // Last: leaving root drops the capabilities that file systems ask for, and returning restores them.
        setfsuid(Uid::from_raw(self.uid));
        let acting = ActingAs { groups };
        if !self.is_root() {
            privileges::pass_over_permissions()?;
        }
        Ok(acting)
    }

    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
        rustix::process::umask(Mode::empty());
        if self.groups {
            // It can only fail for want of a capability, which was there to set them.
            let _ = rustix::thread::set_thread_groups(&[]);
        }
    }
}

impl Caller {
    /// Writes as the caller if `wanted`: see [`privileges::clearing_set_ids`].
    pub(super) fn clearing_set_ids(&self, wanted: bool) -> rustix::io::Result<Option<Unprivileged>> {
        wanted.then(|| privileges::clearing_set_ids(self.gid)).transpose()
    }
}
