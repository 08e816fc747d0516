//! What a FIND found, for the request that follows it on its stream.
//!
//! ```text
//!   FIND ──> nodes, answer held ──> next request: nodes put in, done ──> both answers in one write
//! ```
//!
//! Invariant: an answer is held only while the next request is already here.

use crate::export::wire::abi::{ENTRY_OUT, FOUND, InHeader, OUT_HEADER, node_places, op};
use crate::export::wire::codec::Take;
use crate::export::wire::stream::{Stream, StreamError};

/// The nodes that the last request found, and answers that were not sent yet.
#[derive(Debug, Default)]
pub(super) struct Found {
    nodes: Vec<u64>,
    held: Vec<u8>,
}

impl Found {
    /// Puts the nodes themselves into a request that names them by their place. One that has no such place stays
    /// what no node is.
    pub(super) fn put_into(&self, message: &mut [u8]) {
        for place in node_places(opcode(message)) {
            let Some(number) = message.get_mut(*place..*place + 8) else { continue };
            let named = number.first_chunk().map_or(0, |number| u64::from_le_bytes(*number));
            let found = named.checked_sub(FOUND).and_then(|at| self.nodes.get(usize::try_from(at).ok()?));
            found.into_iter().for_each(|node| number.copy_from_slice(&node.to_le_bytes()));
        }
    }

    /// Sends the answer to `message`, or holds it if it is a FIND's and `more` is here; keeps what was found.
    ///
    /// # Errors
    /// The host is gone.
    pub(super) fn answer(
        &mut self,
        stream: &Stream,
        message: &[u8],
        reply: &[u8],
        more: bool,
    ) -> Result<(), StreamError> {
        self.nodes.clear();
        let finds = opcode(message) == op::FIND;
        if finds {
            let entries = reply.get(OUT_HEADER..).unwrap_or_default().chunks_exact(ENTRY_OUT);
            self.nodes.extend(entries.flat_map(|entry| Take::new(entry).u64()));
        }
        if self.held.is_empty() && !(finds && more) {
            return stream.write_all(reply);
        }
        self.held.extend_from_slice(reply);
        if finds && more {
            return Ok(());
        }
        let sent = stream.write_all(&self.held);
        self.held.clear();
        sent
    }
}

fn opcode(message: &[u8]) -> u32 {
    InHeader::take(&mut Take::new(message)).unwrap_or_default().opcode
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::wire::abi::{Attr, Entry, IN_HEADER, NODEID, OutHeader, ROOT_ID};
    use crate::export::wire::codec::Put;
    use crate::export::wire::stream::Inbox;

    fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
        let mut message = Vec::new();
        let len = (IN_HEADER + body.len()) as u32;
        InHeader { len, opcode, nodeid, ..InHeader::default() }.put(&mut message);
        message.bytes(body);
        message
    }

    fn found(nodes: &[u64]) -> Vec<u8> {
        let mut reply = Vec::new();
        let len = (OUT_HEADER + nodes.len() * ENTRY_OUT) as u32;
        OutHeader { len, error: 0, unique: 0 }.put(&mut reply);
        nodes.iter().for_each(|nodeid| Entry { nodeid: *nodeid, attr: Attr::default() }.put(&mut reply));
        reply
    }

    fn node_of(message: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(message[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_next_request_and_no_other_has_what_was_found() {
        let (ours, _theirs) = Stream::pair().unwrap();
        let mut all = Found::default();
        all.answer(&ours, &request(op::FIND, ROOT_ID, b"a\0b\0"), &found(&[70, 71]), false).unwrap();
        let mut rename = request(op::RENAME2, FOUND, &[(FOUND + 1).to_le_bytes(), [0; 8]].concat());
        all.put_into(&mut rename);
        assert_eq!((node_of(&rename, NODEID), node_of(&rename, IN_HEADER)), (70, 71));
        let mut beyond = request(op::GETATTR, FOUND + 2, &[]);
        all.put_into(&mut beyond);
        assert_eq!(node_of(&beyond, NODEID), FOUND + 2);
        all.answer(&ours, &rename, &found(&[]), false).unwrap();
        let mut later = request(op::GETATTR, FOUND, &[]);
        all.put_into(&mut later);
        assert_eq!(node_of(&later, NODEID), FOUND);
    }

    #[test]
    fn an_answer_is_held_only_while_more_is_here() {
        let (ours, theirs) = Stream::pair().unwrap();
        let (mut all, mut inbox) = (Found::default(), Inbox::default());
        let find = request(op::FIND, ROOT_ID, b"a\0");
        all.answer(&ours, &find, &found(&[70]), true).unwrap();
        assert!(!all.held.is_empty());
        all.answer(&ours, &request(op::RELEASE, 70, &[]), &[], true).unwrap();
        assert!(all.held.is_empty());
        all.answer(&ours, &find, &found(&[71]), false).unwrap();
        all.answer(&ours, &request(op::GETATTR, 71, &[]), &found(&[]), true).unwrap();
        for wanted in [found(&[70]), found(&[71]), found(&[])] {
            assert_eq!(inbox.next(&theirs, OUT_HEADER, 1 << 20).unwrap(), wanted);
        }
    }
}
