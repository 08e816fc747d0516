//! Binds nodes of the host's own to the guest's, before a request about them or together with it.
//!
//! ```text
//!   request needs own nodes ── all but one ──> FIND, answer ──> bound
//!                              the last ─────> FIND and request in one write; answer ──> bound; answer
//! ```
//!
//! Invariant: from when a name of ours is told to the guest until the guest has answered, nobody takes the name away,
//! and who takes it away is alone with it.

use std::sync::Arc;

use super::question::{Question, names_taken, put_u64_at, u64_at};
use super::served::{Chain, is_own};
use super::talk::{Errno, Talk, message};
use crate::export::wire::abi::{
    ENTRY_OUT, Entry, FOUND, IN_HEADER, InHeader, OUT_HEADER, ROOT_ID, node_places, op,
};

/// A node of ours that a request needs in the guest.
#[derive(Clone, Debug)]
struct Need {
    node: u64,
    /// The folder and the name that the request takes from it.
    loses: Option<(u64, Box<[u8]>)>,
}

impl Talk {
    /// Asks the guest, as [`Talk::exchange`] does, for whom nodes of ours mean nothing: those in the message are
    /// bound, and the guest's while it asks.
    pub(super) fn ask_bound(&mut self, header: &InHeader, asked: &mut [u8]) -> Result<(), Errno> {
        let own = own_places(header, asked);
        if own.is_empty() {
            return self.exchange(asked);
        }
        let result = self.ask_of_own(header, asked, &own);
        own.iter().for_each(|(place, id)| put_u64_at(asked, *place, *id));
        result
    }

    fn ask_of_own(&mut self, header: &InHeader, asked: &mut [u8], own: &[(usize, u64)]) -> Result<(), Errno> {
        // Any node tells of the file system that it is in.
        if matches!(header.opcode, op::STATFS | op::SYNCFS) {
            own.iter().for_each(|(place, _)| put_u64_at(asked, *place, ROOT_ID));
            return self.exchange(asked);
        }
        let needs = self.needs(header, own, &asked[IN_HEADER..]);
        match self.bind_all_but_one(header, &needs)? {
            Some(need) => self.ask_finding(header, asked, own, &need),
            None => {
                self.put_guests(asked, own, &[])?;
                self.exchange(asked)
            }
        }
    }

    /// The nodes of ours that are to be bound, those first that lose a name, for the way to them leads through the
    /// others.
    fn needs(&self, header: &InHeader, own: &[(usize, u64)], body: &[u8]) -> Vec<Need> {
        let served = &self.shared.served;
        let mut needs = Vec::new();
        for (folder, name) in names_taken(header, body).into_iter().flatten().filter(|(id, _)| is_own(*id)) {
            if let Some(node) = served.change_name(folder, name) {
                served.change(node);
                needs.push(Need { node, loses: Some((folder, name.into())) });
            }
        }
        needs.extend(own.iter().map(|(_, node)| Need { node: *node, loses: None }));
        needs
    }

    /// Binds all that are not bound but the first of them, if it is to be found with the request.
    fn bind_all_but_one(&mut self, header: &InHeader, needs: &[Need]) -> Result<Option<Need>, Errno> {
        let served = &Arc::clone(&self.shared).served;
        let last = needs.iter().position(|need| served.guest(need.node).is_none());
        let way = last.and_then(|at| served.way(needs[at].node)).map_or(Vec::new(), |way| way.nodes);
        for (at, need) in needs.iter().enumerate() {
            if Some(at) == last || (need.loses.is_none() && way.contains(&need.node)) {
                continue;
            }
            self.guest_node(header, need.node)?;
            need.loses.iter().for_each(|(folder, name)| served.lose_name(*folder, name));
        }
        Ok(last.map(|at| needs[at].clone()))
    }

    /// Finds a node with the request that needs it.
    fn ask_finding(
        &mut self,
        header: &InHeader,
        asked: &mut [u8],
        own: &[(usize, u64)],
        need: &Need,
    ) -> Result<(), Errno> {
        let shared = Arc::clone(&self.shared);
        let alone = need.loses.as_ref().map(|_| shared.served.binding_alone());
        let together = alone.is_none().then(|| shared.served.binding());
        let way = shared.served.way(need.node).ok_or(libc::EIO)?;
        self.put_guests(asked, own, &way.nodes)?;
        let find = find(header, &way);
        let question = Question::of(asked);
        self.begin(&question);
        self.send(&[&find, &*asked].concat());
        let found = self.found(&find, &way);
        if let (Ok(()), Some((folder, name))) = (found, &need.loses) {
            shared.served.take_name(*folder, name);
        }
        drop((alone, together));
        let answered = self.receive(&question);
        self.end();
        found.and(answered)
    }

    /// Puts the guest's numbers in place of ours, or the places of those that are found on the way.
    fn put_guests(&self, asked: &mut [u8], own: &[(usize, u64)], way: &[u64]) -> Result<(), Errno> {
        for (place, id) in own {
            let found = way.iter().position(|on_way| on_way == id).map(|at| FOUND + at as u64);
            let guest = found.or_else(|| self.shared.served.guest(*id)).ok_or(libc::EIO)?;
            put_u64_at(asked, *place, guest);
        }
        Ok(())
    }

    /// The guest's node for one of ours, which it is told of if it does not know it.
    pub(super) fn guest_node(&mut self, header: &InHeader, id: u64) -> Result<u64, Errno> {
        let shared = Arc::clone(&self.shared);
        if let Some(known) = shared.served.guest(id) {
            return Ok(known);
        }
        let _binding = shared.served.binding();
        let way = shared.served.way(id).ok_or(libc::EIO)?;
        if !way.nodes.is_empty() {
            let find = find(header, &way);
            self.begin(&Question::of(&find));
            self.send(&find);
            let found = self.found(&find, &way);
            self.end();
            found?;
        }
        shared.served.guest(id).ok_or(libc::EIO)
    }

    /// Takes what a FIND found.
    fn found(&mut self, find: &[u8], way: &Chain) -> Result<(), Errno> {
        self.receive(&Question::of(find)).map_err(|_| libc::EIO)?;
        let entries = self.answer()[OUT_HEADER..].chunks_exact(ENTRY_OUT);
        let found: Vec<_> = entries.flat_map(Entry::take_completed).collect();
        if self.shared.served.bind(&way.nodes, &found) {
            return Ok(());
        }
        if self.shared.complaints.may() {
            tracing::warn!("the guest finds other files than lie in its layers");
        }
        Err(libc::EIO)
    }
}

/// Where in a message nodes of ours are.
fn own_places(header: &InHeader, asked: &[u8]) -> Vec<(usize, u64)> {
    let places = node_places(header.opcode).iter().map(|place| (*place, u64_at(asked, *place)));
    places.filter(|(_, id)| is_own(*id)).collect()
}

fn find(header: &InHeader, way: &Chain) -> Vec<u8> {
    message(&InHeader { opcode: op::FIND, nodeid: way.from, ..*header }, &way.names)
}
