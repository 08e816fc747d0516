//! One lane's talk with the guest: a question, its answer, checked.

use std::sync::Arc;

use super::check::check;
use super::question::Question;
use super::shared::{Lost, Shared};
use crate::export::wire::abi::{IN_HEADER, InHeader, MAX_MESSAGE, OUT_HEADER, OutHeader, op};
use crate::export::wire::codec::{Put, Take};
use crate::export::wire::stream::{Inbox, StreamError};

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
    pub(super) fn ask(&mut self, message: &[u8]) -> Result<&mut [u8], Errno> {
        let question = Question::of(message);
        self.shared.turns.count(question.opcode);
        self.shared.begin(self.lane, question.unique);
        let result = self.exchange(&question, message);
        self.shared.end(self.lane);
        result?;
        let answer = self.inbox.last();
        match OutHeader::take(&mut Take::new(answer)).map_or(-libc::EIO, |header| header.error) {
            0 => Ok(answer),
            error => Err(-error),
        }
    }

    /// Sends what is not answered.
    pub(super) fn tell(&self, message: &[u8]) {
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

    /// Tells the guest that the kernel does not know these nodes.
    pub(super) fn forget(&self, nodes: &[u64]) {
        if nodes.is_empty() {
            return;
        }
        let mut body = Vec::with_capacity(8 + nodes.len() * 16);
        body.u32(nodes.len() as u32).u32(0);
        nodes.iter().for_each(|node| {
            body.u64(*node).u64(1);
        });
        self.tell(&message(&InHeader { opcode: op::BATCH_FORGET, ..InHeader::default() }, &body));
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
