//! One connection: what the guest may do, what we owe it, and the host's end.
//!
//! ```text
//!                 REQUEST ─────────────────────────────┐ (guest connects: RESPONSE is owed)
//!   Connecting ──RESPONSE──> Open <────────────────────┘
//!       │                     │  both ends send and shut down each direction on its own
//!       │ RST, or the user    │
//!       │ goes away           │ RST from the guest · guest shut both · guest broke the protocol ·
//!       v                     v our SHUTDOWN of both went unanswered
//!     (end)               Draining ──backlog written or user gone──> (end)
//! ```
//!
//! Draining is beyond the protocol: the ports are free again, the user still gets every byte that the
//! guest sent. The table above ([`super::mux`]) carries a [`Verdict`] out: it alone sends RST and forgets.
//!
//! What is owed to the guest is kept as flags and computed from state, never queued, so a guest that takes
//! nothing and asks for everything costs no memory.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vm_memory::VolatileSlice;

use super::credit::{ReceiveCredit, SendCredit};
use super::error::ConnectError;
use super::local::{Local, Readiness};
use super::packet::{Directions, Header, Op, Route};

/// How long the guest may take to answer our SHUTDOWN of both directions: as long as Linux gives its peers.
pub(super) const LINGER: Duration = Duration::from_secs(8);

/// Most data of one packet to the guest: what Linux takes, and a fair share of a busy queue.
const MAX_DATA: usize = 64 * 1024;

/// What becomes of a connection after a packet or an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// Answer RST and forget it.
    Reset,
    /// Forget it: the guest has, or never knew of it.
    Forget,
}

/// Who waits for a connection that the host opens.
#[derive(Debug)]
pub(super) struct Opening {
    /// Gets the host's port.
    pub(super) reply: oneshot::Sender<Result<u32, ConnectError>>,
    /// The user is told `OK <host port>` before the guest's bytes.
    pub(super) greet: bool,
}

#[derive(Debug)]
enum Phase {
    Connecting { opening: Opening, requested: bool },
    Open,
    Draining,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    route: Route,
    phase: Phase,
    local: Local,
    receive: ReceiveCredit,
    send: SendCredit,
    owes_response: bool,
    owes_credit: bool,
    asked_for_credit: bool,
    /// Directions that the guest is done with.
    guest_done: Directions,
    /// Directions that we told the guest we are done with.
    told: Directions,
    /// When the wait for the guest's last RST began.
    lingers_since: Option<Instant>,
}

impl Connection {
    /// The host connects.
    pub(super) fn connecting(route: Route, local: Local, opening: Opening) -> Self {
        Self::new(route, local, Phase::Connecting { opening, requested: false })
    }

    /// The guest's REQUEST is accepted.
    pub(super) fn accepted(request: &Header, route: Route, local: Local) -> Self {
        let mut connection = Self::new(route, local, Phase::Open);
        connection.owes_response = true;
        connection.send.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(route: Route, local: Local, phase: Phase) -> Self {
        Self {
            route,
            phase,
            local,
            receive: ReceiveCredit::default(),
            send: SendCredit::default(),
            owes_response: false,
            owes_credit: false,
            asked_for_credit: false,
            guest_done: Directions::default(),
            told: Directions::default(),
            lingers_since: None,
        }
    }

    pub(super) fn route(&self) -> Route {
        self.route
    }

    /// A packet from the guest; `data` is exactly as long as the header says.
    pub(super) fn receive(&mut self, header: &Header, op: Op, data: &[VolatileSlice<'_>]) -> Verdict {
        self.hear_credit(header);
        match (op, &self.phase) {
            (Op::Reset, _) => Verdict::Forget,
            (Op::Response, Phase::Connecting { requested: true, .. }) => self.open(),
            (_, Phase::Connecting { .. }) | (Op::Request | Op::Response, _) => Verdict::Reset,
            (Op::Shutdown, _) => self.hear_shutdown(Directions::from_flags(header.flags)),
            (Op::Data, _) => self.take_data(header.len, data),
            (Op::CreditUpdate, _) => Verdict::Keep,
            (Op::CreditRequest, _) => {
                self.owes_credit = true;
                Verdict::Keep
            }
        }
    }

    /// Something happened at the socket.
    pub(super) fn ready(&mut self, readiness: Readiness) -> Verdict {
        self.local.ready(readiness);
        self.settle();
        match self.phase {
            Phase::Connecting { requested, .. } if self.local.deaf() => {
                if requested {
                    Verdict::Reset
                } else {
                    Verdict::Forget
                }
            }
            _ => Verdict::Keep,
        }
    }

    /// There may be a packet for the guest.
    pub(super) fn has_output(&self) -> bool {
        match self.phase {
            Phase::Connecting { requested, .. } => !requested,
            Phase::Open => {
                self.owes_response
                    || self.owes_credit()
                    || !self.news().is_empty()
                    || self.can_send()
                    || self.must_ask_for_credit()
            }
            Phase::Draining => false,
        }
    }

    /// The next packet for the guest, its data read into `space`.
    pub(super) fn next_packet(&mut self, space: &[VolatileSlice<'_>]) -> Option<Header> {
        match &mut self.phase {
            Phase::Connecting { requested, .. } if !*requested => {
                *requested = true;
                Some(self.header(Op::Request))
            }
            Phase::Open => self.next_open_packet(space),
            _ => None,
        }
    }

    /// We told the guest that we are done with both directions: its RST is all that is missing.
    pub(super) fn lingers(&self) -> bool {
        matches!(self.phase, Phase::Open) && self.told == Directions::BOTH
    }

    /// Starts the wait for the last RST, or ends it.
    pub(super) fn tick(&mut self, now: Instant) -> Verdict {
        if !self.lingers() {
            return Verdict::Keep;
        }
        let since = *self.lingers_since.get_or_insert(now);
        if now.duration_since(since) >= LINGER { Verdict::Reset } else { Verdict::Keep }
    }

    /// The guest's driver starts anew and knows of no connection. One that it was not told of waits on.
    pub(super) fn guest_reset(&mut self) -> Verdict {
        if matches!(self.phase, Phase::Connecting { requested: false, .. } | Phase::Draining) {
            return Verdict::Keep;
        }
        self.end(ConnectError::Gone(self.route.guest_port));
        Verdict::Forget
    }

    /// The protocol is over; the user still gets what the guest sent. A pending connect fails.
    pub(super) fn end(&mut self, why: ConnectError) {
        if let Phase::Connecting { opening, .. } = std::mem::replace(&mut self.phase, Phase::Draining) {
            // An error means that nobody waits any more.
            let _ = opening.reply.send(Err(why));
        }
        self.local.stop_reading();
        self.local.finish_writing();
    }

    /// Ended, and nothing is left to write.
    pub(super) fn gone(&self) -> bool {
        matches!(self.phase, Phase::Draining) && self.local.held() == 0
    }

    fn hear_credit(&mut self, header: &Header) {
        self.send.update(header.buf_alloc, header.fwd_cnt);
        self.asked_for_credit &= self.send.free() == 0;
    }

    fn open(&mut self) -> Verdict {
        let Phase::Connecting { opening, .. } = std::mem::replace(&mut self.phase, Phase::Open) else {
            return Verdict::Reset;
        };
        let port = self.route.host_port;
        if opening.greet && !self.local.greet(&format!("OK {port}\n")) {
            return Verdict::Reset;
        }
        // An error means that nobody waits any more: the socket's hang-up closes the connection.
        let _ = opening.reply.send(Ok(port));
        Verdict::Keep
    }

    fn hear_shutdown(&mut self, done: Directions) -> Verdict {
        self.guest_done |= done;
        if self.guest_done == Directions::BOTH {
            return Verdict::Reset;
        }
        if self.guest_done.has(Directions::SEND) {
            self.local.finish_writing();
        }
        if self.guest_done.has(Directions::RECEIVE) {
            self.local.stop_reading();
        }
        Verdict::Keep
    }

    fn take_data(&mut self, len: u32, data: &[VolatileSlice<'_>]) -> Verdict {
        if self.guest_done.has(Directions::SEND) || self.receive.take(len).is_err() {
            return Verdict::Reset;
        }
        self.local.write(data);
        self.settle();
        Verdict::Keep
    }

    fn settle(&mut self) {
        self.receive.settle(self.local.held());
    }

    fn next_open_packet(&mut self, space: &[VolatileSlice<'_>]) -> Option<Header> {
        if std::mem::take(&mut self.owes_response) {
            return Some(self.header(Op::Response));
        }
        if let Some(data) = self.next_data(space) {
            return Some(data);
        }
        if let Some(shutdown) = self.next_shutdown() {
            return Some(shutdown);
        }
        if self.owes_credit() {
            return Some(self.header(Op::CreditUpdate));
        }
        if self.must_ask_for_credit() {
            self.asked_for_credit = true;
            return Some(self.header(Op::CreditRequest));
        }
        None
    }

    fn next_data(&mut self, space: &[VolatileSlice<'_>]) -> Option<Header> {
        if !self.can_send() {
            return None;
        }
        let len = self.local.read_into(space, self.send.free().min(MAX_DATA));
        self.settle();
        if len == 0 {
            return None;
        }
        self.send.spend(len);
        let mut header = self.header(Op::Data);
        header.len = len as u32;
        Some(header)
    }

    fn next_shutdown(&mut self) -> Option<Header> {
        let news = self.news();
        if news.is_empty() {
            return None;
        }
        self.told |= news;
        let mut header = self.header(Op::Shutdown);
        header.flags = self.told.flags();
        Some(header)
    }

    /// A header with fresh credit.
    fn header(&mut self, op: Op) -> Header {
        self.owes_credit = false;
        let (buf_alloc, fwd_cnt) = self.receive.announce();
        Header { buf_alloc, fwd_cnt, ..Header::to_guest(self.route, op) }
    }

    /// Directions that the user is done with and the guest does not know.
    fn news(&self) -> Directions {
        let mut done = Directions::default();
        if self.local.ended() {
            done |= Directions::SEND;
        }
        if self.local.deaf() {
            done |= Directions::RECEIVE;
        }
        done.without(self.told)
    }

    fn can_send(&self) -> bool {
        self.local.readable() && self.send.free() > 0
    }

    fn owes_credit(&self) -> bool {
        self.owes_credit || self.receive.update_due()
    }

    fn must_ask_for_credit(&self) -> bool {
        self.local.readable() && self.send.free() == 0 && !self.asked_for_credit
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.local.as_fd()
    }
}
