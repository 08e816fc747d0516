//! Requests about nodes of the host's own, answered without the guest.

use super::check::Remember;
use super::lane::Lane;
use super::lazy::{Ahead, State};
use super::question::u32_at;
use super::reading::{Wanted, allow, tell};
use super::served::{Listed, Look, is_own};
use super::talk::Errno;
use crate::export::wire::abi::{
    ATTR, CAPABILITIES, DIRENT, ENTRY_OUT, IN_HEADER, InHeader, NAME_MAX, dirent_len, op,
};
use crate::export::wire::codec::Put;

/// How many entries of a folder are looked at together.
const TOGETHER: usize = 4096;

/// Extended attributes that are not there in a file that has none. Of others the guest may say that they cannot be.
const PLAIN: [&[u8]; 3] = [b"user.", CAPABILITIES, b"system.posix_acl_"];

impl Lane {
    /// Answers a request about a node of ours that is as it lies in its layer; `false` if the guest has to.
    pub(super) fn answer_own(&mut self, header: &InHeader, message: &[u8]) -> bool {
        if !is_own(header.nodeid) || self.talk.shared.is_lost() {
            return false;
        }
        let (shared, body) = (self.shared(), &message[IN_HEADER..]);
        match header.opcode {
            op::LOOKUP => return self.look_own(header, body),
            op::GETATTR => match shared.served.attr(header.nodeid) {
                Some(attr) => self.device.answer_body(header.unique, &shared.remember.attr_out_of(&attr)),
                None => return false,
            },
            op::READLINK => match shared.served.target(header.nodeid) {
                Some(target) => self.device.answer_body(header.unique, &target),
                None => return false,
            },
            op::GETXATTR if is_plain(body) && shared.served.is_bare(header.nodeid) => {
                self.device.answer_errno(header.unique, libc::ENODATA);
            }
            op::LISTXATTR if shared.served.is_bare(header.nodeid) => {
                let length_only = u32_at(body, 0) == 0;
                self.device.answer_body(header.unique, if length_only { &[0; 8] } else { &[] });
            }
            _ => return false,
        }
        true
    }

    fn look_own(&mut self, header: &InHeader, body: &[u8]) -> bool {
        let Some(name) = body.strip_suffix(&[0]).filter(|name| name.len() <= NAME_MAX) else { return false };
        let shared = self.shared();
        match shared.served.look(header.nodeid, name) {
            Look::Guest => return false,
            Look::Absent => self.device.answer_body(header.unique, &shared.remember.absent()),
            Look::Here(entry) => {
                let out = shared.remember.entry_out(entry.nodeid, &entry.attr);
                shared.told.tell(header.nodeid, name, entry.nodeid, &out[ENTRY_OUT - ATTR..]);
                self.device.answer_body(header.unique, &out);
            }
        }
        true
    }

    /// Lists a folder of ours; `false` if the guest has to.
    pub(super) fn list_own(
        &mut self,
        header: &InHeader,
        wanted: &Wanted,
        state: &mut State,
    ) -> Result<bool, Errno> {
        let shared = self.shared();
        // What begins in the middle began in the kernel's cache, which was filled from here.
        let begun = state.begun || wanted.offset != 0 && state.guest.is_none();
        if !is_own(header.nodeid) || shared.is_lost() || !(wanted.offset == 0 || begun) {
            return Ok(false);
        }
        let changes = shared.changes();
        let listing = shared.served.list(header.nodeid, wanted.offset, TOGETHER, begun);
        let Some((listed, whole)) = listing else {
            // The guest counts a folder's entries in its own way.
            return if begun { Err(libc::EIO) } else { Ok(false) };
        };
        if whole && wanted.offset == 0 {
            let names = listed.iter().map(|one| one.raw.name.to_bytes());
            shared.keep_names(header.nodeid, names, changes);
        }
        let mut entries = Vec::with_capacity(listed.len() * 192);
        listed.iter().for_each(|one| put_listed(one, shared.remember, &mut entries));
        let mut ahead = Ahead::new(&entries, wanted.offset, whole, changes);
        let taken = ahead.take(wanted.offset, wanted.size, changes).unwrap_or_default();
        state.begun = true;
        state.listed = allow(state.listed, taken, shared.most_entries)?;
        tell(&shared, header.nodeid, taken);
        self.device.answer_body(header.unique, taken);
        if let Some(old) = shared.lazies.keep(state, ahead) {
            self.talk.forget(&old.untold());
        }
        Ok(true)
    }
}

/// Whether an extended attribute's absence is for the host to tell.
fn is_plain(body: &[u8]) -> bool {
    body.get(8..).is_some_and(|name| PLAIN.iter().any(|plain| name.starts_with(plain)))
}

/// Appends an entry of a listing.
fn put_listed(one: &Listed, remember: Remember, entries: &mut Vec<u8>) {
    match &one.node {
        Some((id, attr)) => entries.extend_from_slice(&remember.entry_out(*id, attr)),
        None => entries.resize(entries.len() + ENTRY_OUT, 0),
    }
    let name = one.raw.name.to_bytes();
    entries.u64(one.raw.ino).u64(one.raw.next).u32(name.len() as u32).u32(one.raw.kind).bytes(name);
    entries.resize(entries.len() + dirent_len(name.len()) - DIRENT - name.len(), 0);
}
