//! Reading files and listing folders that the guest may not have open.

use std::sync::Arc;

use super::attrs::Moment;
use super::check::{Folder, entries};
use super::lane::Lane;
use super::lazy::{Ahead, State};
use super::question::{put_u64_at, u32_at, u64_at};
use super::shared::{Shared, lock};
use super::shortcut::HostFile;
use super::talk::{Errno, message};
use crate::export::wire::abi::{IN_HEADER, InHeader, MAX_DATA, OUT_HEADER, flag, op};
use crate::export::wire::codec::Put;
use crate::export::wire::lent::UpperHint;

/// How many bytes of entries come when a folder is opened: those of about four
/// thousand files.
const AHEAD: u32 = 768 * 1024;

/// A listing as the kernel asks for it.
pub(super) struct Wanted {
    pub(super) offset: u64,
    pub(super) size: usize,
}

impl Lane {
    pub(super) fn read(&mut self, header: &InHeader, request: &mut [u8]) {
        let shared = self.shared();
        let Some(lazy) = shared.lazies.find(u64_at(request, IN_HEADER)) else {
            return self.pass(header, request);
        };
        let mut state = lock(&lazy.state);
        if let Some(host) = lower_file(&shared, header.nodeid, &mut state) {
            drop(state);
            if self.read_here(header, request, &host) {
                return;
            }
            state = lock(&lazy.state);
        }
        if let Some(guest) = state.guest {
            drop(state);
            put_u64_at(request, IN_HEADER, guest);
            return self.pass(header, request);
        }
        if let Err(errno) = self.open_and_read(header, request, &mut state) {
            self.device.answer_errno(header.unique, errno);
        }
    }

    /// Reads the host's file, if it still is the union's.
    fn read_here(&mut self, header: &InHeader, request: &[u8], host: &HostFile) -> bool {
        let shared = self.shared();
        let (offset, size) = (u64_at(request, IN_HEADER + 8), u32_at(request, IN_HEADER + 16).min(MAX_DATA));
        if shared.shortcut.give(host, (offset, size as usize), &self.device, header.unique, &mut self.pipe) {
            return true;
        }
        if self.data.len() < size as usize {
            self.data.resize(size as usize, 0);
        }
        let Some(done) = shared.shortcut.read(host, offset, &mut self.data[..size as usize]) else {
            return false;
        };
        self.device.answer_body(header.unique, &self.data[..done]);
        true
    }

    fn open_and_read(
        &mut self,
        header: &InHeader,
        request: &mut [u8],
        state: &mut State,
    ) -> Result<(), Errno> {
        self.open_and_read_how(header, request, state, 0)
    }

    /// `how` says whether the guest may lend the file.
    fn open_and_read_how(
        &mut self,
        header: &InHeader,
        request: &mut [u8],
        state: &mut State,
        how: u32,
    ) -> Result<(), Errno> {
        let wanted = (u64_at(request, IN_HEADER + 8), u32_at(request, IN_HEADER + 16));
        let mut question = to_open_and_read(header, wanted, how);
        let shared = self.shared();
        let now = shared.shortcut.now();
        let answer = self.talk.ask(&mut question)?;
        state.guest = Some(u64_at(answer, OUT_HEADER)).filter(|handle| *handle != 0);
        let (hint, data) = answer[OUT_HEADER + 16..].split_at(u32_at(answer, OUT_HEADER + 8) as usize);
        if hint.is_empty() {
            self.device.answer_body(header.unique, data);
            return Ok(());
        }
        if keep_hint(&shared, header.nodeid, state, hint, now) {
            return match state.upper.clone() {
                Some(upper) => self.read_lent(header, request, &upper),
                None if how == 0 => self.open_and_read_how(header, request, state, flag::OPEN_NOT_LENT),
                None => Err(libc::EIO),
            };
        }
        let host = state.host.clone();
        if !host.is_some_and(|host| self.read_here(header, request, &host)) {
            put_u64_at(request, IN_HEADER, state.guest.ok_or(libc::EIO)?);
            self.pass(header, request);
        }
        Ok(())
    }

    /// Asks where a file lies that is open to be read, without reading it.
    pub(super) fn look_for(&mut self, header: &InHeader, state: &mut State) -> Result<(), Errno> {
        let shared = self.shared();
        let now = shared.shortcut.now();
        let answer = self.talk.ask(&mut to_open_and_read(header, (0, 0), 0))?;
        state.guest = Some(u64_at(answer, OUT_HEADER)).filter(|handle| *handle != 0);
        let (hint, _) = answer[OUT_HEADER + 16..].split_at(u32_at(answer, OUT_HEADER + 8) as usize);
        keep_hint(&shared, header.nodeid, state, hint, now);
        Ok(())
    }

    pub(super) fn list(&mut self, header: &InHeader, request: &mut [u8]) {
        let shared = self.shared();
        let Some(lazy) = shared.lazies.find(u64_at(request, IN_HEADER)) else {
            return self.device.answer_errno(header.unique, libc::EBADF);
        };
        let mut state = lock(&lazy.state);
        if let Err(errno) = self.list_folder(header, request, &mut state) {
            self.device.answer_errno(header.unique, errno);
        }
    }

    fn list_folder(&mut self, header: &InHeader, request: &mut [u8], state: &mut State) -> Result<(), Errno> {
        let size = u32_at(request, IN_HEADER + 16) as usize;
        let wanted = Wanted { offset: u64_at(request, IN_HEADER + 8), size };
        if wanted.offset == 0 {
            state.listed = 0;
            state.begun = false;
        }
        if self.list_ahead(header, &wanted, state)? || self.list_own(header, &wanted, state)? {
            return Ok(());
        }
        if state.guest.is_none() {
            self.open_and_list(header, state)?;
            if self.list_ahead(header, &wanted, state)? {
                return Ok(());
            }
        }
        self.list_on(header, request, state)
    }

    fn open_and_list(&mut self, header: &InHeader, state: &mut State) -> Result<(), Errno> {
        let shared = self.shared();
        // Before the guest looks: what changes from now on makes the listing old.
        let (changes, now, then) = (shared.changes(), shared.shortcut.now(), shared.moment());
        let mut body = Vec::with_capacity(8);
        body.u32(AHEAD).u32(0);
        let mut request = message(&InHeader { opcode: op::OPENDIR_READ, ..*header }, &body);
        let answer = self.talk.ask(&mut request)?;
        let folder = Folder::of(&answer[OUT_HEADER..]).map_err(|_| libc::EIO)?;
        state.guest = Some(folder.guest);
        keep_attrs(&shared, folder.entries, then);
        shared.shortcut.keep(&folder, now);
        if folder.whole {
            shared.keep_names(header.nodeid, entries(folder.entries).map(|entry| entry.name), changes);
        }
        let ahead = Ahead::new(folder.entries, 0, folder.whole, changes);
        if let Some(old) = shared.lazies.keep(state, ahead) {
            self.talk.forget(&old.untold());
        }
        Ok(())
    }

    /// Answers from what was listed ahead, if that is where the kernel is and nothing has changed since.
    fn list_ahead(&mut self, header: &InHeader, wanted: &Wanted, state: &mut State) -> Result<bool, Errno> {
        let shared = self.shared();
        let changes = shared.changes();
        if let Some(ahead) = &mut state.ahead
            && let Some(entries) = ahead.take(wanted.offset, wanted.size, changes)
        {
            state.listed = allow(state.listed, entries, shared.most_entries)?;
            tell(&shared, header.nodeid, entries);
            self.device.answer_body(header.unique, entries);
            return Ok(true);
        }
        if let Some(old) = shared.lazies.drop_ahead(state) {
            self.talk.forget(&old.untold());
        }
        Ok(false)
    }

    fn list_on(&mut self, header: &InHeader, request: &mut [u8], state: &mut State) -> Result<(), Errno> {
        let shared = self.shared();
        put_u64_at(request, IN_HEADER, state.guest.ok_or(libc::EIO)?);
        let then = shared.moment();
        let answer = self.talk.ask(request)?;
        keep_attrs(&shared, &answer[OUT_HEADER..], then);
        let listed = allow(state.listed, &answer[OUT_HEADER..], shared.most_entries);
        state.listed = listed.inspect_err(|_| {
            if shared.complaints.may() {
                tracing::warn!(nodeid = header.nodeid, "the guest lists a folder without end");
            }
        })?;
        tell(&shared, header.nodeid, &answer[OUT_HEADER..]);
        self.device.answer(answer);
        Ok(())
    }
}

/// Asks for `wanted`: from where, how many bytes.
fn to_open_and_read(header: &InHeader, wanted: (u64, u32), how: u32) -> Vec<u8> {
    let mut body = Vec::with_capacity(24);
    body.u32(0).u32(how).u64(wanted.0).u32(wanted.1).u32(0);
    message(&InHeader { opcode: op::OPEN_READ, ..*header }, &body)
}

/// Opens what a hint names, if it can be; whether it says that the file lies in the upper folder.
fn keep_hint(shared: &Shared, nodeid: u64, state: &mut State, hint: &[u8], since: u64) -> bool {
    let is_upper = UpperHint::take(hint).is_ok();
    if is_upper {
        state.upper = shared.upper.open_to_read(hint);
    } else {
        state.host = shared.shortcut.follow(hint, nodeid, since).map(Arc::new);
    }
    is_upper
}

/// The lower file behind an open one, if it is at hand.
pub(super) fn lower_file(shared: &Shared, nodeid: u64, state: &mut State) -> Option<Arc<HostFile>> {
    if state.host.is_none() && state.guest.is_none() {
        let since = shared.shortcut.now();
        state.host = match shared.served.place(nodeid) {
            Some(place) => shared.shortcut.own(nodeid, &place, since),
            None => shared.shortcut.at_hand(nodeid),
        }
        .map(Arc::new);
    }
    state.host.clone()
}

/// The kernel gets a listing.
pub(super) fn tell(shared: &Shared, folder: u64, listing: &[u8]) {
    entries(listing).for_each(|entry| shared.told.tell(folder, entry.name, entry.nodeid, entry.attr));
}

fn keep_attrs(shared: &Shared, listing: &[u8], then: Option<Moment>) {
    entries(listing).for_each(|entry| shared.keep_attr(entry.nodeid, entry.attr, then));
}

/// Counts entries, up to as many as a folder may have.
pub(super) fn allow(listed: u64, listing: &[u8], most: u64) -> Result<u64, Errno> {
    let listed = listed + entries(listing).count() as u64;
    if listed > most { Err(libc::EIO) } else { Ok(listed) }
}
