//! One lane's talk with the guest: a question, its answer, checked.

use std::sync::Arc;

use super::check::check;
use super::question::{Question, put_u64_at, u64_at};
use super::settle::{settle, without_place};
use super::shared::{Lost, Shared};
use crate::export::wire::abi::{IN_HEADER, InHeader, MAX_MESSAGE, NODEID, OUT_HEADER, OutHeader, op};
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
        self.ask_bound(&header, message)?;
        let answer = self.inbox.last();
        settle(&self.shared.served, &header, &message[IN_HEADER..], &mut answer[OUT_HEADER..]);
        Ok(without_place(header.opcode, answer))
    }

    /// Asks about nodes that are the guest's.
    pub(super) fn exchange(&mut self, message: &[u8]) -> Result<(), Errno> {
        let question = Question::of(message);
        self.begin(&question);
        self.send(message);
        let result = self.receive(&question);
        self.end();
        result
    }

    /// A turn begins.
    pub(super) fn begin(&self, question: &Question) {
        self.shared.turns.count(question.opcode);
        self.shared.begin(self.lane);
    }

    pub(super) fn end(&self) {
        self.shared.end(self.lane);
    }

    /// The answer that was received last.
    pub(super) fn answer(&mut self) -> &mut [u8] {
        self.inbox.last()
    }

    /// Sends what is not answered, if it is about a node that the guest knows.
    pub(super) fn tell(&self, message: &mut [u8]) {
        let Some(guest) = self.shared.served.guest(u64_at(message, NODEID)) else { return };
        put_u64_at(message, NODEID, guest);
        self.send(message);
    }

    pub(super) fn send(&self, message: &[u8]) {
        if !self.shared.is_lost() && self.shared.lanes[self.lane].stream.write_all(message).is_err() {
            self.shared.give_up(Lost::Closed);
        }
    }

    /// Waits for the answer to what was sent.
    pub(super) fn receive(&mut self, question: &Question) -> Result<(), Errno> {
        if self.shared.is_lost() {
            return Err(libc::EIO);
        }
        let stream = &self.shared.lanes[self.lane].stream;
        if let Err(error) = next_answer(&mut self.inbox, &mut self.late, question, stream) {
            self.shared.give_up(lost(&error));
            return Err(libc::EIO);
        }
        let answer = self.inbox.last();
        let unique = unique(answer);
        if let Err(malformed) = check(question, answer, self.shared.remember) {
            if self.shared.complaints.may() {
                let Question { opcode, nodeid, .. } = question;
                tracing::warn!(opcode, nodeid, "the guest's answer is refused: {malformed}");
            }
            self.owe(question.unique, unique);
            return Err(libc::EIO);
        }
        match OutHeader::take(&mut Take::new(answer)).map_or(-libc::EIO, |header| header.error) {
            0 => Ok(()),
            error => Err(-error),
        }
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
