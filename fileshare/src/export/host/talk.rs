//! One lane's talk with the guest: a question, its answer, checked.

use std::sync::Arc;

use super::check::check;
use super::question::{Question, names_taken, node_places, put_u64_at, u64_at};
use super::served::is_own;
use super::settle::{settle, without_place};
use super::shared::{Lost, Shared};
use crate::export::wire::abi::{
    ENTRY_OUT, Entry, IN_HEADER, InHeader, MAX_MESSAGE, NODEID, OUT_HEADER, OutHeader, ROOT_ID, op,
};
use crate::export::wire::codec::{Put, Take};
use crate::export::wire::stream::{Inbox, StreamError};

/// How many nodes one message says are forgotten.
const FORGET_AT_ONCE: usize = 4096;

/// Answers to other requests are left out, but only so many.
const MOST_LATE: usize = 16;

/// An error number for the kernel.
pub(super) type Errno = i32;

/// A lane's end of its stream.
#[derive(Debug)]
pub(super) struct Talk {
    pub(super) shared: Arc<Shared>,
    lane: usize,
    inbox: Inbox,
    late: Vec<u64>,
}

impl Talk {
    pub(super) fn new(shared: Arc<Shared>, lane: usize) -> Self {
        Self { shared, lane, inbox: Inbox::default(), late: Vec::new() }
    }

    /// Sends a request and waits for its answer: the whole message, checked and complete.
    ///
    /// Nodes of ours are the guest's in what is sent, and the guest's are ours, where they are, in what is returned.
    pub(super) fn ask(&mut self, message: &mut [u8]) -> Result<&mut [u8], Errno> {
        let header = InHeader::take(&mut Take::new(message)).map_err(|_| libc::EIO)?;
        self.prepare_names(&header, &message[IN_HEADER..])?;
        let mut put = Vec::new();
        for place in node_places(header.opcode).iter().copied() {
            let id = u64_at(message, place);
            if is_own(id) {
                put.push((place, id, self.guest_node(&header, id)?));
            }
        }
        put.iter().for_each(|(place, _, guest)| put_u64_at(message, *place, *guest));
        let asked = self.ask_guest(message);
        put.iter().for_each(|(place, own, _)| put_u64_at(message, *place, *own));
        asked?;
        let answer = self.inbox.last();
        settle(&self.shared.served, &header, &message[IN_HEADER..], &mut answer[OUT_HEADER..]);
        Ok(without_place(header.opcode, answer))
    }

    /// The same with nodes as the guest has them.
    fn ask_guest(&mut self, message: &[u8]) -> Result<(), Errno> {
        let question = Question::of(message);
        self.shared.turns.count(question.opcode);
        self.shared.begin(self.lane, question.unique);
        let result = self.exchange(&question, message);
        self.shared.end(self.lane);
        result?;
        let answer = self.inbox.last();
        match OutHeader::take(&mut Take::new(answer)).map_or(-libc::EIO, |header| header.error) {
            0 => Ok(()),
            error => Err(-error),
        }
    }

    /// Binds the nodes of ours whose names a request may take, before it does.
    fn prepare_names(&mut self, header: &InHeader, body: &[u8]) -> Result<(), Errno> {
        for (folder, name) in names_taken(header, body).into_iter().flatten().filter(|(id, _)| is_own(*id)) {
            if let Some(node) = self.shared.served.change_name(folder, name) {
                self.shared.served.change(node);
                self.guest_node(header, node)?;
                self.shared.served.lose_name(folder, name);
            }
        }
        Ok(())
    }

    /// The guest's node for one of ours, which it is told of if it does not know it.
    pub(super) fn guest_node(&mut self, header: &InHeader, id: u64) -> Result<u64, Errno> {
        let shared = Arc::clone(&self.shared);
        if let Some(known) = shared.served.guest(id) {
            return Ok(known);
        }
        // Any node tells of the file system that it is in.
        if matches!(header.opcode, op::STATFS | op::SYNCFS) {
            return Ok(ROOT_ID);
        }
        let _binding = shared.served.binding();
        let way = shared.served.way(id).ok_or(libc::EIO)?;
        if !way.nodes.is_empty() {
            let request = message(&InHeader { opcode: op::FIND, nodeid: way.from, ..*header }, &way.names);
            self.ask_guest(&request).map_err(|_| libc::EIO)?;
            let found: Vec<_> = self.inbox.last()[OUT_HEADER..]
                .chunks_exact(ENTRY_OUT)
                .flat_map(Entry::take_completed)
                .collect();
            if !shared.served.bind(&way.nodes, &found) {
                if shared.complaints.may() {
                    tracing::warn!("the guest finds other files than lie in its layers");
                }
                return Err(libc::EIO);
            }
        }
        shared.served.guest(id).ok_or(libc::EIO)
    }

    /// Sends what is not answered, if it is about a node that the guest knows.
    pub(super) fn tell(&self, message: &mut [u8]) {
        let Some(guest) = self.shared.served.guest(u64_at(message, NODEID)) else { return };
        put_u64_at(message, NODEID, guest);
        self.send(message);
    }

    fn send(&self, message: &[u8]) {
        if !self.shared.is_lost() && self.shared.lanes[self.lane].stream.write_all(message).is_err() {
            self.shared.give_up(Lost::Closed);
        }
    }

    fn exchange(&mut self, question: &Question, message: &[u8]) -> Result<(), Errno> {
        if self.shared.is_lost() {
            return Err(libc::EIO);
        }
        let stream = &self.shared.lanes[self.lane].stream;
        let sent = stream.write_all(message);
        let answered = sent.and_then(|()| next_answer(&mut self.inbox, &mut self.late, question, stream));
        if let Err(error) = answered {
            self.shared.give_up(lost(&error));
            return Err(libc::EIO);
        }
        let answer = self.inbox.last();
        let unique = unique(answer);
        check(question, answer, self.shared.remember).map_err(|malformed| {
            if self.shared.complaints.may() {
                let Question { opcode, nodeid, .. } = question;
                tracing::warn!(opcode, nodeid, "the guest's answer is refused: {malformed}");
            }
            self.owe(question.unique, unique);
            libc::EIO
        })
    }

    /// Notes that a request may yet be answered, when the answer to it was another's.
    fn owe(&mut self, wanted: u64, got: u64) {
        if wanted == got {
            return;
        }
        self.late.push(wanted);
        if self.late.len() > MOST_LATE {
            self.shared.give_up(Lost::Broken("answers belong to no request".to_owned()));
        }
    }

    /// The kernel was not told of these nodes, though the guest told.
    pub(super) fn forget(&self, nodes: &[u64]) {
        self.forget_counted(nodes.iter().map(|node| (*node, 1)));
    }

    /// The kernel forgot these nodes so often.
    pub(super) fn forget_counted(&self, nodes: impl Iterator<Item = (u64, u64)>) {
        let gone: Vec<_> = nodes.flat_map(|(node, count)| self.shared.served.forget(node, count)).collect();
        // So many that a message can hold them.
        for gone in gone.chunks(FORGET_AT_ONCE) {
            let mut body = Vec::with_capacity(8 + gone.len() * 16);
            body.u32(gone.len() as u32).u32(0);
            gone.iter().for_each(|(node, count)| {
                body.u64(*node).u64(*count);
            });
            self.send(&message(&InHeader { opcode: op::BATCH_FORGET, ..InHeader::default() }, &body));
        }
    }
}

fn next_answer(
    inbox: &mut Inbox,
    late: &mut Vec<u64>,
    question: &Question,
    stream: &crate::export::wire::stream::Stream,
) -> Result<(), StreamError> {
    loop {
        let unique = unique(inbox.next(stream, OUT_HEADER, MAX_MESSAGE)?);
        match late.iter().position(|owed| *owed == unique) {
            Some(at) if unique != question.unique => drop(late.swap_remove(at)),
            _ => return Ok(()),
        }
    }
}

fn unique(answer: &[u8]) -> u64 {
    OutHeader::take(&mut Take::new(answer)).unwrap_or_default().unique
}

fn lost(error: &StreamError) -> Lost {
    match error {
        StreamError::Closed | StreamError::Failed(_) => Lost::Closed,
        StreamError::Length(length) => Lost::Broken(format!("an answer of {length} bytes")),
    }
}

/// A request of ours, in the name of who sent another.
pub(super) fn message(header: &InHeader, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(IN_HEADER + body.len());
    let len = (IN_HEADER + body.len()) as u32;
    InHeader { len, extensions: 0, ..*header }.put(&mut message);
    message.bytes(body);
    message
}
