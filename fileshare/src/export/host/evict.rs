//! Has the kernel forget files when it knows more than may be open: each that it knows is an open file in the guest,
//! and another in the share's daemon, and the kernel by itself forgets only for want of memory.
//!
//! ```text
//!   lookup, create, listing ──> kernel knows one more; its name at the queue's end
//!   too many ──> a thread of its own: "forget these", oldest first ──> kernel ── FORGET ──> guest
//! ```
//!
//! What is in use stays known. Kernels before 6.18 can only be told to forget names: there a file in use stays known
//! without its name, and what is mounted on a file goes. Folders are not evicted: with one would go all that is
//! mounted below it.
//!
//! Invariant: nobody waits for an eviction. The kernel locks the folder for it, which may be held by one who waits
//! for the guest.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::device::{Device, Gone};
use super::served::is_own;
use super::shared::lock;
use crate::export::wire::abi::{Attr, NAME_MAX};
use crate::export::wire::codec::Take;

/// How many nodes of the host's own the kernel may know: they are open nowhere, and cost memory only.
const MOST_OWN: u64 = 1 << 18;

/// How many the kernel is asked to forget with one message.
const AT_ONCE: usize = 256;

/// What the kernel knows: the guest's nodes, and the host's own.
#[derive(Debug)]
pub(super) struct Told {
    guests: Kind,
    own: Kind,
}

#[derive(Debug)]
struct Kind {
    most: u64,
    /// How often it was told of a node and has not forgotten.
    count: AtomicU64,
    names: Mutex<VecDeque<Named>>,
}

/// What the kernel was told of.
#[derive(Debug)]
struct Named {
    folder: u64,
    name: Box<[u8]>,
    node: u64,
}

impl Told {
    pub(super) fn new(most: u64) -> Self {
        Self { guests: Kind::new(most), own: Kind::new(MOST_OWN) }
    }

    fn kind(&self, nodeid: u64) -> &Kind {
        if is_own(nodeid) { &self.own } else { &self.guests }
    }

    /// The kernel is told of a node under a name.
    pub(super) fn tell(&self, folder: u64, name: &[u8], nodeid: u64, attr: &[u8]) {
        self.kind(nodeid).tell(folder, name, nodeid, attr);
    }

    /// The kernel forgot a node so often.
    pub(super) fn forgotten(&self, nodeid: u64, count: u64) {
        // The kernel is trusted to forget no more than it was told.
        self.kind(nodeid).count.fetch_sub(count, Ordering::Relaxed);
    }

    pub(super) fn count(&self) -> u64 {
        self.guests.count() + self.own.count()
    }

    /// Whether one look more may be one too late; `bound` of the host's own are the guest's, too.
    pub(super) fn is_nearly_full(&self, bound: u64) -> bool {
        self.guests.count() + bound > self.guests.most / 2 || self.own.count() > self.own.most / 2
    }

    /// Evicts the oldest if there are too many.
    pub(super) fn evict(&self, device: &Device, bound: u64) -> Result<(), Gone> {
        let most = self.guests.most;
        self.guests.evict(device, most)?;
        // Some of those that the guest knows may be among the oldest: by and by all of them are.
        let own = if bound > most { self.own.count() - self.own.count() / 8 } else { self.own.most };
        self.own.evict(device, own)
    }
}

impl Kind {
    fn new(most: u64) -> Self {
        Self { most, count: AtomicU64::new(0), names: Mutex::default() }
    }

    fn tell(&self, folder: u64, name: &[u8], nodeid: u64, attr: &[u8]) {
        if nodeid == 0 {
            return;
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let is_file = Attr::take(&mut Take::new(attr)).is_ok_and(|attr| attr.kind() != libc::S_IFDIR);
        if is_file && name.len() <= NAME_MAX {
            let mut names = lock(&self.names);
            names.push_back(Named { folder, name: name.into(), node: nodeid });
            // Names of what was forgotten for other reasons.
            while names.len() as u64 > 2 * self.count().max(self.most) {
                names.pop_front();
            }
        }
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn evict(&self, device: &Device, most: u64) -> Result<(), Gone> {
        if self.count() <= most {
            return Ok(());
        }
        // Some room, so that it is not done for each single file.
        let mut left = self.count().saturating_sub(most - most / 8) as usize;
        while left > 0 {
            let mut names = lock(&self.names);
            let count = left.min(AT_ONCE).min(names.len());
            let oldest: Vec<_> = names.drain(..count).collect();
            drop(names);
            if oldest.is_empty() {
                return Ok(());
            }
            forget(device, &oldest)?;
            left -= count;
        }
        Ok(())
    }
}

fn forget(device: &Device, all: &[Named]) -> Result<(), Gone> {
    let nodes: Vec<_> = all.iter().map(|one| one.node).collect();
    if device.prune(&nodes)? {
        return Ok(());
    }
    all.iter().try_for_each(|one| device.forget_name(one.folder, &one.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::wire::abi::ATTR;
    use crate::export::wire::codec::Put;

    #[test]
    fn names_of_files_are_kept_up_to_a_bound() {
        let told = Told::new(4);
        let attr = |kind: u32| {
            let mut attr = Vec::new();
            Attr { mode: kind, ..Attr::default() }.put(&mut attr);
            assert_eq!(attr.bytes(&[]).len(), ATTR);
            attr
        };
        told.tell(1, b"folder", 2, &attr(libc::S_IFDIR));
        told.tell(1, b"none", 0, &attr(0));
        assert!((told.count(), lock(&told.guests.names).len()) == (1, 0));
        (3..30).for_each(|node| told.tell(1, b"file", node, &attr(libc::S_IFREG)));
        assert_eq!((told.count(), lock(&told.guests.names).len()), (28, 27));
        told.forgotten(3, 28);
        told.tell(1, b"file", 30, &attr(libc::S_IFREG));
        assert_eq!((told.count(), lock(&told.guests.names).len()), (1, 8), "names of what was forgotten");
        told.tell(1, b"own", crate::export::wire::abi::OWN_NODES, &attr(libc::S_IFREG));
        assert_eq!((told.count(), lock(&told.guests.names).len()), (2, 8), "open nowhere");
    }
}
