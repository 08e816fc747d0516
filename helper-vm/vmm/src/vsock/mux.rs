//! The table of connections: routes packets, schedules what goes to the guest, sends resets.
//!
//! ```text
//!   guest's packet ──> receive ──> connection          or a RST into `resets`
//!   socket event   ──> ready ────> connection
//!   host connects  ──> connect ──> new connection
//!
//!   next_packet <── resets first, then `turns`: slots with something to say, one packet each, round and round
//! ```
//!
//! Bounds: [`MAX_CONNECTIONS`] slots; a slot stands in `turns` at most once; RSTs that answer packets stop
//! the intake of packets at [`MAX_RESETS`] ([`Mux::takes_packets`]), RSTs that we start are as many as
//! connections at most. So a guest that sends all it can and takes nothing costs bounded memory.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::VolatileSlice;
use vmctr_proto::GuestCid;

use super::connection::{Connection, Opening, Verdict};
use super::error::ConnectError;
use super::listen::Listeners;
use super::local::{Local, Readiness};
use super::packet::{HOST_CID, Header, Op, Route, TYPE_STREAM};
use super::poller::Poller;

/// Connections of one VM, draining ones included.
pub(super) const MAX_CONNECTIONS: usize = 1024;

/// RSTs owed to the guest beyond which no packet is taken from it.
pub(super) const MAX_RESETS: usize = 256;

/// First host port of connections that the host opens.
const FIRST_PORT: u32 = 1 << 30;

/// A connect that the host asks for.
#[derive(Debug)]
pub(super) struct Connect {
    /// Port in the guest.
    pub(super) port: u32,
    /// The device's end of the connection, nonblocking.
    pub(super) local: UnixStream,
    /// Who waits.
    pub(super) opening: Opening,
}

#[derive(Debug, Default)]
struct Slot {
    connection: Option<Connection>,
    in_turns: bool,
}

/// The table.
#[derive(Debug)]
pub(super) struct Mux {
    guest: GuestCid,
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_route: HashMap<Route, usize>,
    turns: VecDeque<usize>,
    resets: VecDeque<Header>,
    next_port: u32,
    lingering: bool,
    poller: Arc<Poller>,
    listeners: Arc<Listeners>,
}

impl Mux {
    pub(super) fn new(guest: GuestCid, poller: Arc<Poller>, listeners: Arc<Listeners>) -> Self {
        Self {
            guest,
            slots: Vec::new(),
            free: Vec::new(),
            by_route: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            lingering: false,
            poller,
            listeners,
        }
    }

    /// False while the guest must first take the resets that it is owed.
    pub(super) fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// A packet from the guest, of which `data` is what the header's `len` counts.
    pub(super) fn receive(&mut self, header: &Header, data: &[VolatileSlice<'_>]) {
        let Some(route) = self.route(header) else { return };
        let slot = if header.kind == TYPE_STREAM { self.by_route.get(&route).copied() } else { None };
        match (slot, header.op()) {
            (Some(slot), Some(op)) => self.with(slot, |c| c.receive(header, op, data)),
            (Some(slot), None) => self.with(slot, |_| Verdict::Reset),
            (None, Some(Op::Request)) if header.kind == TYPE_STREAM => self.accept(header, route),
            (None, _) => self.refuse(header),
        }
    }

    /// A packet from the guest whose `len` is more than its buffers hold, or whose buffers are nowhere.
    pub(super) fn receive_broken(&mut self, header: &Header) {
        let Some(route) = self.route(header) else { return };
        match self.by_route.get(&route).copied() {
            Some(slot) => self.with(slot, |_| Verdict::Reset),
            None => self.refuse(header),
        }
    }

    /// There may be a packet for the guest.
    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// The next packet for the guest, its data read into `space`. None: there is nothing (that fits).
    pub(super) fn next_packet(&mut self, space: &[VolatileSlice<'_>]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        for _ in 0..self.turns.len() {
            let packet = self.turns.pop_front().and_then(|slot| self.take_turn(slot, space));
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// The host opens a connection; REQUEST leaves when the guest takes packets.
    pub(super) fn connect(&mut self, connect: Connect) {
        let Connect { port, local, opening } = connect;
        if self.live() >= MAX_CONNECTIONS {
            // An error means that nobody waits any more.
            let _ = opening.reply.send(Err(ConnectError::Full(MAX_CONNECTIONS)));
            return;
        }
        let route = self.free_route(port);
        self.insert(Connection::connecting(route, Local::new(local), opening));
    }

    /// Something happened at the socket in `slot`.
    pub(super) fn ready(&mut self, slot: usize, readiness: Readiness) {
        self.with(slot, |c| c.ready(readiness));
    }

    /// Lets go of connections whose last RST does not come.
    pub(super) fn tick(&mut self, now: Instant) {
        self.lingering = false;
        for slot in 0..self.slots.len() {
            self.with(slot, |c| c.tick(now));
        }
    }

    /// [`Self::tick`] has something to wait for.
    pub(super) fn lingers(&self) -> bool {
        self.lingering
    }

    /// The guest's driver was reset: it knows of no connection any more. Connects that it was not told of wait on.
    pub(super) fn reset(&mut self) {
        self.resets.clear();
        for slot in 0..self.slots.len() {
            self.with(slot, Connection::guest_reset);
        }
    }

    /// Connections, draining ones included.
    pub(super) fn live(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Where a packet belongs, if it is from our guest to the host at all.
    fn route(&self, header: &Header) -> Option<Route> {
        let ours = header.src_cid == u64::from(u32::from(self.guest)) && header.dst_cid == HOST_CID;
        ours.then_some(Route { guest: self.guest, guest_port: header.src_port, host_port: header.dst_port })
    }

    /// Answers a packet that belongs nowhere. A RST is never answered.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Reset as u16 {
            return;
        }
        if let Some(route) = self.route(header) {
            self.resets.push_back(Header { kind: header.kind, ..Header::to_guest(route, Op::Reset) });
        }
    }

    fn accept(&mut self, request: &Header, route: Route) {
        if self.try_accept(request, route).is_none() {
            self.refuse(request);
        }
    }

    fn try_accept(&mut self, request: &Header, route: Route) -> Option<()> {
        if self.live() >= MAX_CONNECTIONS {
            return None;
        }
        let (device, user) = nonblocking_pair().ok()?;
        self.listeners.deliver(route.host_port, user).then_some(())?;
        self.insert(Connection::accepted(request, route, Local::new(device)));
        Some(())
    }

    fn free_route(&mut self, guest_port: u32) -> Route {
        loop {
            let host_port = self.next_port;
            self.next_port = host_port.checked_add(1).unwrap_or(FIRST_PORT);
            let route = Route { guest: self.guest, guest_port, host_port };
            if !self.by_route.contains_key(&route) {
                return route;
            }
        }
    }

    fn insert(&mut self, connection: Connection) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let watched = self.poller.watch(slot, &connection);
        self.by_route.insert(connection.route(), slot);
        self.slots[slot].connection = Some(connection);
        // A socket that cannot be watched would hang; epoll refuses only for want of kernel memory.
        self.with(slot, |_| if watched.is_ok() { Verdict::Keep } else { Verdict::Reset });
    }

    /// Lets a connection act, carries out its verdict and gives it a turn if it has something to say.
    fn with(&mut self, slot: usize, act: impl FnOnce(&mut Connection) -> Verdict) {
        let Some(connection) = self.slots.get_mut(slot).and_then(|s| s.connection.as_mut()) else { return };
        let verdict = act(connection);
        let route = connection.route();
        if verdict == Verdict::Keep {
            self.lingering |= connection.lingers();
            self.settle(slot);
            return;
        }
        if verdict == Verdict::Reset {
            self.resets.push_back(Header::to_guest(route, Op::Reset));
        }
        connection.end(ConnectError::Refused(route.guest_port));
        self.by_route.remove(&route);
        self.settle(slot);
    }

    /// Frees the slot of a connection that is gone, or queues the connection for its turn.
    fn settle(&mut self, slot: usize) {
        let Some(connection) = self.slots[slot].connection.as_ref() else { return };
        if connection.gone() {
            self.slots[slot].connection = None;
            self.free.push(slot);
        } else if connection.has_output() && !self.slots[slot].in_turns {
            self.slots[slot].in_turns = true;
            self.turns.push_back(slot);
        }
    }

    fn take_turn(&mut self, slot: usize, space: &[VolatileSlice<'_>]) -> Option<Header> {
        self.slots[slot].in_turns = false;
        let packet = self.slots[slot].connection.as_mut()?.next_packet(space);
        self.with(slot, |_| Verdict::Keep);
        packet
    }
}

/// A connected pair of sockets: device's end and user's end.
pub(super) fn nonblocking_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (device, user) = UnixStream::pair()?;
    device.set_nonblocking(true)?;
    user.set_nonblocking(true)?;
    Ok((device, user))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_used_again_and_again_waits_for_one_turn() {
        let listeners = Arc::new(Listeners::default());
        let mut listener = listeners.listen(1).unwrap();
        let mut mux = Mux::new(GuestCid::DEFAULT, Arc::new(Poller::new().unwrap()), listeners);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let mut packet = Header { src_cid: 3, dst_cid: HOST_CID, dst_port: 1, kind: 1, ..Header::default() };
        for _ in 0..1000 {
            packet.op = Op::Request as u16;
            mux.receive(&packet, &[]);
            drop(runtime.block_on(listener.accept()).unwrap());
            packet.op = Op::Reset as u16;
            mux.receive(&packet, &[]);
        }
        assert_eq!((mux.live(), mux.turns.len(), mux.slots.len()), (0, 1, 1));
    }
}
