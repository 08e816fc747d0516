//! Files of a union that nobody can change, read by the kernel from the layer itself (FUSE passthrough).
//!
//! ```text
//!   first OPEN of a node ──> large, and found in its layer? ── registered ──> way: through, and so for all that
//!        │                                                                    open the node until the last closes
//!        └── no ──> way: cached, likewise
//!   last RELEASE ──> the kernel drops the layer's file
//! ```
//!
//! Invariants:
//! 1. All that have a node open at a time go the same way, through the same file: the kernel refuses others.
//! 2. Only where there is no upper folder: who has opened a file so keeps that file, and would see no copy-up.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use super::device::Device;
use super::lane::Lane;
use super::lazy::State;
use super::reading::lower_file;
use super::shared::{Shared, lock};
use crate::export::sys::Backing;
use crate::export::wire::abi::{Attr, InHeader, flag};
use crate::export::wire::codec::{Put, Take};

/// Smaller files are as well read into the kernel's cache of the mount, where the next reader needs no opening.
const LARGE: u64 = 128 * 1024;

/// The ways of the nodes that are open.
#[derive(Debug, Default)]
pub(super) struct Through(Mutex<HashMap<u64, Way>>);

#[derive(Debug)]
struct Way {
    /// What the kernel knows the layer's file by; `None` if it does not.
    backing: Option<Backing>,
    openers: u64,
}

impl Through {
    /// One more opens a node whose way is known; that way.
    fn join(&self, node: u64) -> Option<Option<u32>> {
        let mut ways = lock(&self.0);
        let way = ways.get_mut(&node)?;
        way.openers += 1;
        Some(way.backing.as_ref().map(Backing::id))
    }

    /// Opens a node by this way, if it is the first; else by the others'.
    fn open(&self, device: &Device, node: u64, backing: Option<Backing>) -> Option<u32> {
        let mut ways = lock(&self.0);
        let way = match ways.entry(node) {
            Entry::Occupied(known) => {
                backing.into_iter().for_each(|mine| device.unregister(&mine));
                known.into_mut()
            }
            Entry::Vacant(new) => new.insert(Way { backing, openers: 0 }),
        };
        way.openers += 1;
        way.backing.as_ref().map(Backing::id)
    }

    /// One that had it open has closed it.
    pub(super) fn release(&self, device: &Device, node: u64) {
        let mut ways = lock(&self.0);
        let Entry::Occupied(mut way) = ways.entry(node) else { return };
        way.get_mut().openers -= 1;
        if way.get().openers == 0 {
            way.remove().backing.into_iter().for_each(|backing| device.unregister(&backing));
        }
    }
}

impl Lane {
    /// Opens a file to be read.
    pub(super) fn open_to_read(&mut self, header: &InHeader) {
        let shared = self.shared();
        let Some(backing) = self.open_through(&shared, header) else {
            return self.open_here(header, shared.flags.file);
        };
        let mut body = Vec::with_capacity(16);
        body.u64(shared.lazies.add()).u32(flag::FOPEN_PASSTHROUGH).u32(backing);
        self.device.answer_body(header.unique, &body);
    }

    fn open_through(&mut self, shared: &Shared, header: &InHeader) -> Option<u32> {
        let through = shared.through.as_ref().filter(|_| !shared.is_lost())?;
        if let Some(way) = through.join(header.nodeid) {
            return way;
        }
        let backing = self.find_large(shared, header).and_then(|file| self.device.register(&file));
        through.open(&self.device, header.nodeid, backing)
    }

    /// The layer's file that a node is, if it is a large one.
    fn find_large(&mut self, shared: &Shared, header: &InHeader) -> Option<OwnedFd> {
        let known = || Attr::take(&mut Take::new(shared.known_attr(header.nodeid)?.get(16..)?)).ok();
        let attr = shared.served.attr(header.nodeid).or_else(known)?;
        if attr.size < LARGE {
            return None;
        }
        let mut state = State::default();
        if lower_file(shared, header.nodeid, &mut state).is_none() {
            self.look_for(header, &mut state).ok()?;
            state.guest.into_iter().for_each(|handle| self.close_in_guest(header, handle));
        }
        state.host?.try_clone().ok()
    }
}
