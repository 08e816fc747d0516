//! One relay thread: takes a request from the kernel, finds its answer, hands it back.
//!
//! ```text
//!   here       opening to read, closing, what the guest does not serve
//!   lane       all else: asked on this lane's stream, answered before the next request is taken
//!   waits      locks that are waited for, interrupts
//!   untold     releases, forgets: sent, and the kernel is answered at once
//! ```
//!
//! When the guest is lost, the thread stays and answers EIO, so that nobody hangs and the mount can be taken
//! away.

use std::sync::Arc;

use super::attrs::Moment;
use super::device::{Device, Gone};
use super::known::Known;
use super::pipe::Pipe;
use super::question::{changes, handle_places, is_served, made, opens_to_write, put_u64_at, u32_at, u64_at};
use super::shared::Shared;
use super::talk::{Errno, Talk, message};
use crate::export::wire::abi::{
    ATTR, CAPABILITIES, ENTRY_OUT, IN_HEADER, InHeader, MAX_MESSAGE, NAME_MAX, NO_CAPABILITIES, NODEID,
    OPEN_OUT, OUT_HEADER, flag, folders_after, op,
};
use crate::export::wire::codec::{Put, Take};

/// From before the guest is asked: what is kept of its answer must not be older than what changes it.
#[derive(Clone, Copy, Debug)]
struct Before {
    moment: Option<Moment>,
    dressed: u64,
}

impl Before {
    fn now(shared: &Shared) -> Self {
        Self { moment: shared.moment(), dressed: shared.known.as_ref().map_or(0, Known::dressed) }
    }
}

/// A relay thread's own.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) device: Arc<Device>,
    pub(super) talk: Talk,
    /// What is read here.
    pub(super) data: Vec<u8>,
    /// Much of it goes to the kernel by this way.
    pub(super) pipe: Pipe,
}

impl Lane {
    pub(super) fn new(device: Device, shared: Arc<Shared>, lane: usize) -> Self {
        Self {
            device: Arc::new(device),
            talk: Talk::new(shared, lane),
            data: Vec::new(),
            pipe: Pipe::default(),
        }
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.talk.shared)
    }

    /// Relays until the mount is gone.
    pub(super) fn run(mut self) {
        self.talk.shared.upper.prepare_thread();
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let length = match self.device.next(&mut buffer) {
                Ok(message) => message.len(),
                Err(Gone) => return,
            };
            self.relay(&mut buffer[..length]);
        }
    }

    fn relay(&mut self, message: &mut [u8]) {
        let header = InHeader::take(&mut Take::new(message)).unwrap_or_default();
        // Where others write, too, who opens a file sees what was written before.
        if header.opcode == op::OPEN && self.talk.shared.attrs.is_none() {
            self.device.forget_attributes(header.nodeid);
        }
        if self.answer_own(&header, message) || self.answer_lent(&header, message) {
            return;
        }
        let result = match header.opcode {
            op::FORGET | op::BATCH_FORGET => return self.forget(&header, message),
            op::NOTIFY_REPLY => return,
            op::INTERRUPT => return self.interrupt(message),
            op::IOCTL => Err(libc::ENOTTY),
            op::DESTROY => Ok(()),
            op::OPEN if !opens_to_write(u32_at(&message[IN_HEADER..], 0)) => {
                return self.open_to_read(&header);
            }
            op::OPENDIR => return self.open_folder(&header),
            op::RELEASE | op::RELEASEDIR => self.release(message),
            op::FLUSH if !self.has_locks(&header, message) => Ok(()),
            op::SETLKW => return self.wait(&header, message),
            op::GETATTR => return self.attributes(&header, message),
            // Kernels pass names on that are longer than any folder's.
            op::LOOKUP if message.len() - IN_HEADER > NAME_MAX + 1 => Err(libc::ENAMETOOLONG),
            op::LOOKUP if self.lacks(&header, message) => {
                return self.device.answer_body(header.unique, &self.talk.shared.remember.absent());
            }
            op::GETXATTR if self.lacks_capabilities(&header, message) => Err(libc::ENODATA),
            op::READ => return self.read(&header, message),
            op::READDIRPLUS => return self.list(&header, message),
            opcode if is_served(opcode) => return self.pass(&header, message),
            _ => Err(libc::ENOSYS),
        };
        self.device.answer_errno(header.unique, result.err().unwrap_or(0));
    }

    /// Asks the guest and hands its answer to the kernel.
    pub(super) fn pass(&mut self, header: &InHeader, message: &mut [u8]) {
        if let Err(errno) = self.ask_guest(header, message) {
            self.device.answer_errno(header.unique, errno);
        }
    }

    pub(super) fn ask_guest(&mut self, header: &InHeader, message: &mut [u8]) -> Result<(), Errno> {
        self.talk.shared.note_lock(header, message);
        self.put_handles(header, message)?;
        let shared = self.shared();
        let changes = changes(header.opcode, &message[IN_HEADER..]);
        let note = |message: &[u8]| {
            if changes {
                shared.note(header, &message[IN_HEADER..]);
            }
        };
        note(message);
        let before = Before::now(&shared);
        let answer = self.talk.ask(message);
        note(message);
        let (answer, folders) = part(header.opcode, answer?);
        let (answer, hint) = part_hint(header.opcode, answer);
        let body = &message[IN_HEADER..];
        keep_folders(&shared, header, body, folders, before.moment.map(Moment::after_change));
        keep(&shared, header, answer, before);
        if header.opcode == op::OPEN && !hint.is_empty() {
            let handle = u64_at(answer, OUT_HEADER);
            if !shared.upper.lend(header.nodeid, handle, hint) {
                return self.open_unlent(header, message, handle);
            }
            if shared.upper.is_bare(header.nodeid) {
                note_bare(&shared, header.nodeid, before);
            }
        }
        if changes && header.opcode == op::OPEN && shared.may_part(header.nodeid) {
            self.device.forget_attributes(header.nodeid);
        }
        put_open_flags(&shared, header.opcode, answer, hint);
        if let Some(name) = made(header.opcode, body) {
            let entry = &answer[OUT_HEADER..];
            let attr = &entry[ENTRY_OUT - ATTR..ENTRY_OUT];
            shared.told.tell(header.nodeid, name, u64_at(entry, 0), attr);
        }
        // A lock that another thread's close has made this side forget meanwhile.
        shared.note_lock(header, message);
        self.device.answer(answer);
        Ok(())
    }

    /// Whether a folder is known to have no such name.
    fn lacks(&self, header: &InHeader, message: &[u8]) -> bool {
        let known = self.talk.shared.known.as_ref();
        !self.talk.shared.is_lost()
            && known.is_some_and(|known| known.lacks(header.nodeid, &message[IN_HEADER..]))
    }

    /// Whether it is asked for capabilities, as the kernel does before it writes, and there are none.
    fn lacks_capabilities(&self, header: &InHeader, message: &[u8]) -> bool {
        let wanted = message[IN_HEADER..].get(8..8 + CAPABILITIES.len() + 1);
        let asks = wanted.and_then(|name| name.strip_suffix(&[0])) == Some(CAPABILITIES);
        let known = self.talk.shared.known.as_ref().filter(|_| asks && !self.talk.shared.is_lost());
        known.is_some_and(|known| known.is_bare(header.nodeid))
    }

    fn attributes(&mut self, header: &InHeader, message: &mut [u8]) {
        match self.talk.shared.known_attr(header.nodeid) {
            Some(answer) => self.device.answer_body(header.unique, &answer),
            None => self.pass(header, message),
        }
    }

    /// Replaces handles of ours by the guest's, which it is asked for where it has none yet.
    pub(super) fn put_handles(&mut self, header: &InHeader, message: &mut [u8]) -> Result<(), Errno> {
        let body = &mut message[IN_HEADER..];
        for place in handle_places(header.opcode, body) {
            let handle = u64_at(body, *place);
            // A copy's other file is another node.
            let node = if *place == 24 { u64_at(body, 16) } else { header.nodeid };
            let header = InHeader { nodeid: node, ..*header };
            put_u64_at(body, *place, self.guest_handle(&header, handle)?);
        }
        Ok(())
    }

    /// The guest's handle behind one that the kernel holds.
    fn guest_handle(&mut self, header: &InHeader, handle: u64) -> Result<u64, Errno> {
        let shared = self.shared();
        let Some(lazy) = shared.lazies.find(handle) else { return Ok(handle) };
        let mut state = super::shared::lock(&lazy.state);
        if let Some(guest) = state.guest {
            return Ok(guest);
        }
        let is_folder = matches!(header.opcode, op::FSYNCDIR | op::READDIR);
        let opcode = if is_folder { op::OPENDIR_READ } else { op::OPEN };
        // No flags to open with, or no room for entries.
        let mut request = message(&InHeader { opcode, ..*header }, &[0; 8]);
        let guest = u64_at(self.talk.ask(&mut request)?, OUT_HEADER);
        state.guest = Some(guest);
        Ok(guest)
    }

    fn forget(&self, header: &InHeader, message: &[u8]) {
        let body = &message[IN_HEADER..];
        let forgotten: Vec<_> = match header.opcode {
            op::FORGET => vec![(header.nodeid, u64_at(body, 0))],
            _ => {
                let all = body.get(8..).unwrap_or_default().chunks_exact(16);
                all.map(|one| (u64_at(one, 0), u64_at(one, 8))).collect()
            }
        };
        forgotten.iter().for_each(|(node, count)| self.talk.shared.told.forgotten(*node, *count));
        self.talk.forget_counted(forgotten.into_iter());
    }

    fn open_folder(&self, header: &InHeader) {
        let shared = &self.talk.shared;
        let may_list = shared.listings.opened(header.nodeid);
        let flags = if shared.served.is_moved(header.nodeid) {
            // The kernel keeps no listing of a folder that was the host's to list: it would not know whose offsets it has.
            0
        } else if may_list {
            shared.flags.folder
        } else {
            shared.flags.folder & !flag::FOPEN_CACHE_DIR
        };
        self.open_here(header, flags);
    }

    pub(super) fn open_here(&self, header: &InHeader, flags: u32) {
        let shared = &self.talk.shared;
        if shared.is_lost() {
            return self.device.answer_errno(header.unique, libc::EIO);
        }
        let mut body = Vec::with_capacity(16);
        body.u64(shared.lazies.add()).u32(flags).u32(0);
        self.device.answer_body(header.unique, &body);
    }

    fn release(&mut self, message: &mut [u8]) -> Result<(), Errno> {
        let shared = self.shared();
        let handle = u64_at(&message[IN_HEADER..], 0);
        // Before the guest hears of it: it believes then what it sees of the file.
        shared.upper.release(u64_at(message, NODEID), handle);
        if let Some(through) = shared.through.as_ref().filter(|_| u32_at(message, 4) == op::RELEASE) {
            through.release(&self.device, u64_at(message, NODEID));
        }
        if u32_at(message, 4) == op::RELEASEDIR {
            shared.listings.closed(u64_at(message, NODEID));
        }
        let mut guest = Some(handle);
        if let Some(lazy) = shared.lazies.remove(handle) {
            let mut state = super::shared::lock(&lazy.state);
            guest = state.guest;
            if let Some(ahead) = shared.lazies.drop_ahead(&mut state) {
                self.talk.forget(&ahead.untold());
            }
        }
        if let Some(guest) = guest {
            put_u64_at(&mut message[IN_HEADER..], 0, guest);
            self.talk.tell(message);
        }
        Ok(())
    }

    /// Whether the process that closes may have had locks, which that drops.
    fn has_locks(&self, header: &InHeader, message: &[u8]) -> bool {
        self.talk.shared.forget_lock(header.nodeid, u64_at(&message[IN_HEADER..], 16))
    }

    fn wait(&mut self, header: &InHeader, message: &mut [u8]) {
        let shared = self.shared();
        shared.note_lock(header, message);
        let put = self.put_handles(header, message).and_then(|()| {
            let guest = self.talk.guest_node(header, header.nodeid)?;
            put_u64_at(message, NODEID, guest);
            Ok(())
        });
        match put {
            Ok(()) if !shared.is_lost() => shared.waits.add(&shared, &self.device, header, message),
            Ok(()) => self.device.answer_errno(header.unique, libc::EIO),
            Err(errno) => self.device.answer_errno(header.unique, errno),
        }
    }

    /// Requests on a lane are short: only those that wait are interrupted, or are about to.
    fn interrupt(&self, message: &[u8]) {
        let shared = &self.talk.shared;
        if !shared.is_lost() {
            shared.waits.interrupt(shared, u64_at(&message[IN_HEADER..], 0));
        }
    }
}

/// Parts an answer that was checked into the kernel's and the attributes of folders that follow.
fn part(opcode: u32, answer: &mut [u8]) -> (&mut [u8], &[u8]) {
    let length = answer.len().saturating_sub(folders_after(opcode) * ATTR);
    let (answer, folders) = answer.split_at_mut(length);
    answer[..4].copy_from_slice(&(length as u32).to_le_bytes());
    (answer, folders)
}

/// Parts an answer from the hint where a file lies that was opened or made.
fn part_hint(opcode: u32, answer: &mut [u8]) -> (&mut [u8], &[u8]) {
    let kernels = match opcode {
        op::OPEN => OUT_HEADER + OPEN_OUT,
        op::CREATE | op::TMPFILE => OUT_HEADER + ENTRY_OUT + OPEN_OUT,
        _ => answer.len(),
    };
    let length = kernels.min(answer.len());
    let (answer, hint) = answer.split_at_mut(length);
    answer[..4].copy_from_slice(&(length as u32).to_le_bytes());
    (answer, hint)
}

/// Keeps the attributes of folders that a request changed. They hold if it was the only change: if since the guest
/// was asked there was none but the one that is counted when it has answered.
fn keep_folders(shared: &Shared, header: &InHeader, body: &[u8], folders: &[u8], then: Option<Moment>) {
    let nodes = match header.opcode {
        op::RENAME | op::RENAME2 => [u64_at(body, 0), header.nodeid],
        _ => [header.nodeid; 2],
    };
    for (node, attr) in nodes.into_iter().zip(folders.chunks_exact(ATTR)) {
        shared.keep_attr(node, attr, then);
    }
}

fn note_bare(shared: &Shared, file: u64, before: Before) {
    if let Some(known) = &shared.known {
        known.bare(file, before.dressed);
    }
}

fn note_made(shared: &Shared, folder: u64) {
    if let Some(known) = &shared.known {
        known.made(folder);
    }
}

fn keep_entry(shared: &Shared, answer: &[u8], then: Option<Moment>) {
    let entry = &answer[OUT_HEADER..];
    shared.keep_attr(u64_at(entry, 0), &entry[ENTRY_OUT - ATTR..ENTRY_OUT], then);
}

/// Keeps what an answer says for requests to come.
fn keep(shared: &Shared, header: &InHeader, answer: &[u8], before: Before) {
    match header.opcode {
        op::LOOKUP => keep_entry(shared, answer, before.moment),
        op::MKDIR => note_made(shared, u64_at(answer, OUT_HEADER)),
        op::GETATTR => shared.keep_attr(header.nodeid, &answer[OUT_HEADER + 16..], before.moment),
        op::OPEN if u32_at(answer, OUT_HEADER + 12) == NO_CAPABILITIES => {
            note_bare(shared, header.nodeid, before);
        }
        op::CREATE | op::TMPFILE => note_bare(shared, u64_at(answer, OUT_HEADER), before),
        _ => {}
    }
}

/// Completes the answer to what opens a file, and lends one that was made.
fn put_open_flags(shared: &Shared, opcode: u32, answer: &mut [u8], hint: &[u8]) {
    match opcode {
        op::OPEN => put_flags(answer, OUT_HEADER, shared.flags.file),
        op::CREATE | op::TMPFILE => {
            if !hint.is_empty() {
                // Else it is written through the guest.
                shared.upper.lend(u64_at(answer, OUT_HEADER), u64_at(answer, OUT_HEADER + ENTRY_OUT), hint);
            }
            put_flags(answer, OUT_HEADER + ENTRY_OUT, shared.flags.file);
        }
        _ => {}
    }
}

fn put_flags(answer: &mut [u8], at: usize, flags: u32) {
    // What stands after them is for this side only.
    put_u64_at(answer, at + 8, flags.into());
}
