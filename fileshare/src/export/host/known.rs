//! What need not be asked because of what was said before: names that a folder lacks, files without capabilities.
//!
//! ```text
//!   folder made here, or listed whole ──> all its names ── name made or moved there ──> one more
//!                                              └── lookup of another name: there is none
//!   file made here, or opened to write ──> no capabilities ── attribute set ──> unknown
//! ```
//!
//! Invariant: a folder has no name that is not among those kept for it. Names that went stay: they only cost a turn.
//! Only right where nobody else changes the files.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::question::u64_at;
use super::shared::lock;
use crate::export::wire::abi::op;

/// How many names, and how many files, are kept.
const MOST: usize = 1 << 18;

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Known {
    folders: Mutex<Folders>,
    bare: Mutex<HashSet<u64>>,
    /// Counts the attributes that were set.
    dressed: AtomicU64,
}

/// Names by their hashes: one that is taken for another only costs a turn.
#[derive(Debug, Default)]
struct Folders {
    names: HashMap<u64, HashSet<u64>>,
    count: usize,
    hasher: RandomState,
}

impl Folders {
    fn insert(&mut self, folder: u64, names: HashSet<u64>) {
        if self.count + names.len() + 1 > MOST {
            self.names.clear();
            self.count = 0;
        }
        self.count += names.len() + 1;
        self.names.insert(folder, names);
    }

    fn add(&mut self, folder: u64, name: &[u8]) {
        let hash = self.hasher.hash_one(name);
        let Some(names) = self.names.get_mut(&folder) else { return };
        if self.count >= MOST {
            self.names.clear();
            self.count = 0;
        } else if names.insert(hash) {
            self.count += 1;
        }
    }
}

impl Known {
    /// A folder was just made: it is empty.
    pub(super) fn made(&self, folder: u64) {
        lock(&self.folders).insert(folder, HashSet::new());
    }

    /// A folder was listed whole. Nothing is kept if `changes` has counted on since it was asked for.
    pub(super) fn listed<'a>(
        &self,
        folder: u64,
        names: impl Iterator<Item = &'a [u8]>,
        (before, changes): (u64, &AtomicU64),
    ) {
        let mut folders = lock(&self.folders);
        let names: HashSet<_> = names.map(|name| folders.hasher.hash_one(name)).collect();
        // Changes are counted before their names are added, for which the lock is needed.
        if changes.load(Ordering::Acquire) == before && names.len() < MOST {
            folders.insert(folder, names);
        }
    }

    /// A request is about to be sent, or was just answered, that may make a name or set an attribute.
    pub(super) fn about_to(&self, opcode: u32, nodeid: u64, body: &[u8]) {
        let (folder, names) = match opcode {
            op::SYMLINK => (nodeid, body),
            op::MKDIR => (nodeid, &body[8.min(body.len())..]),
            op::MKNOD | op::CREATE => (nodeid, &body[16.min(body.len())..]),
            op::LINK => (nodeid, &body[8.min(body.len())..]),
            op::RENAME => (u64_at(body, 0), second(body, 8)),
            op::RENAME2 => (u64_at(body, 0), second(body, 16)),
            op::SETXATTR => return self.dress(nodeid),
            _ => return,
        };
        lock(&self.folders).add(folder, string(names));
    }

    /// Whether a folder has no such name.
    pub(super) fn lacks(&self, folder: u64, body: &[u8]) -> bool {
        let folders = lock(&self.folders);
        let hash = folders.hasher.hash_one(string(body));
        folders.names.get(&folder).is_some_and(|names| !names.contains(&hash))
    }

    /// To be asked for before the guest is asked whether a file has capabilities.
    pub(super) fn dressed(&self) -> u64 {
        self.dressed.load(Ordering::Acquire)
    }

    /// A file had no capabilities, `since` then. Nothing is kept if an attribute was set since.
    pub(super) fn bare(&self, file: u64, since: u64) {
        let mut bare = lock(&self.bare);
        if self.dressed() != since {
            return;
        }
        if bare.len() >= MOST {
            bare.clear();
        }
        bare.insert(file);
    }

    fn dress(&self, file: u64) {
        let mut bare = lock(&self.bare);
        self.dressed.fetch_add(1, Ordering::AcqRel);
        bare.remove(&file);
    }

    /// Whether a file is known to have no capabilities.
    pub(super) fn is_bare(&self, file: u64) -> bool {
        lock(&self.bare).contains(&file)
    }
}

/// Up to the NUL.
fn string(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// What follows the first of two strings.
fn second(body: &[u8], at: usize) -> &[u8] {
    let names = &body[at.min(body.len())..];
    names.get(string(names).len() + 1..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_was_made_has_what_was_put_there() {
        let known = Known::default();
        assert!(!known.lacks(5, b"name\0"), "nothing is known of it");
        known.made(5);
        assert!(known.lacks(5, b"name\0"));
        let long = |length: usize, names: &[u8]| [&vec![0; length][..], names].concat();
        for (opcode, nodeid, body) in [
            (op::SYMLINK, 5, b"name\0target\0".to_vec()),
            (op::MKDIR, 5, long(8, b"name\0")),
            (op::MKNOD, 5, long(16, b"name\0")),
            (op::CREATE, 5, long(16, b"name\0")),
            (op::LINK, 5, long(8, b"name\0")),
            (op::RENAME, 1, [&5u64.to_le_bytes()[..], b"old\0name\0"].concat()),
            (op::RENAME2, 1, [&5u64.to_le_bytes()[..], &[0; 8], b"old\0name\0"].concat()),
        ] {
            known.made(5);
            known.about_to(opcode, nodeid, &body);
            assert!(!known.lacks(5, b"name\0"), "{opcode}");
            assert!(known.lacks(5, b"old\0"), "{opcode}");
            known.about_to(opcode, nodeid, &[]);
        }
    }

    #[test]
    fn a_listing_counts_only_if_nothing_changed_meanwhile() {
        let (known, changes) = (Known::default(), AtomicU64::new(3));
        known.listed(5, [&b"a"[..]].into_iter(), (2, &changes));
        assert!(!known.lacks(5, b"b\0"));
        known.listed(5, [&b"a"[..]].into_iter(), (3, &changes));
        assert!(known.lacks(5, b"b\0") && !known.lacks(5, b"a\0"));
    }

    #[test]
    fn it_is_bounded() {
        let known = Known::default();
        (0..=MOST as u64).for_each(|folder| known.made(folder));
        assert!(lock(&known.folders).names.len() <= MOST);
        (0..=MOST as u64).for_each(|file| known.bare(file, 0));
        assert!(lock(&known.bare).len() <= MOST);
        known.made(1);
        (0..=MOST).for_each(|name| known.about_to(op::SYMLINK, 1, name.to_string().as_bytes()));
        assert!(lock(&known.folders).count <= MOST);
    }

    #[test]
    fn a_file_is_bare_until_an_attribute_is_set() {
        let known = Known::default();
        known.bare(7, known.dressed());
        assert!(known.is_bare(7) && !known.is_bare(8));
        known.about_to(op::SETXATTR, 7, &[]);
        assert!(!known.is_bare(7));
    }
}
