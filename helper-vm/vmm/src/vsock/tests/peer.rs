//! A guest that follows the standard, the table it talks to, and the users on the host. All in one thread:
//! nothing happens unless a step makes it happen.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vm_memory::VolatileSlice;
use vmctr_proto::GuestCid;

use crate::vsock::connection::Opening;
use crate::vsock::error::ConnectError;
use crate::vsock::listen::{Listener, Listeners};
use crate::vsock::mux::{Connect, Mux, nonblocking_pair};
use crate::vsock::packet::{Directions, HOST_CID, Header, Op, Route, TYPE_STREAM};
use crate::vsock::poller::{Poller, Wakeup};

/// Host port with a listener.
pub(super) const LISTENED: u32 = 99;

/// Byte `at` of what one side of connection `id` sends.
fn byte(id: u32, from_guest: bool, at: usize) -> u8 {
    (at.wrapping_mul(31) + (at >> 8) * 7 + id as usize * 13 + usize::from(from_guest) * 101) as u8
}

fn bytes(id: u32, from_guest: bool, start: usize, len: usize) -> Vec<u8> {
    (start..start + len).map(|at| byte(id, from_guest, at)).collect()
}

/// The guest's side of a connection.
#[derive(Debug, Default)]
pub(super) struct GuestEnd {
    route: Option<Route>,
    buf_alloc: u32,
    received: u32,
    read: u32,
    unread: VecDeque<u8>,
    pub(super) read_total: usize,
    host_buf_alloc: u32,
    host_forwarded: u32,
    sent: u32,
    pub(super) sent_total: usize,
    pub(super) told: Directions,
    pub(super) host_told: Directions,
    pub(super) open: bool,
    pub(super) reset: bool,
}

/// The user's side.
#[derive(Debug)]
pub(super) struct UserEnd {
    pub(super) stream: Option<UnixStream>,
    answer: Option<oneshot::Receiver<Result<u32, ConnectError>>>,
    pub(super) refused: bool,
    pub(super) sent_total: usize,
    pub(super) read_total: usize,
    pub(super) shut_write: bool,
    pub(super) eof: bool,
}

/// One connection from both sides; its number is its guest port.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) guest: GuestEnd,
    pub(super) user: UserEnd,
}

/// What the guest does of its own choice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// It takes REQUESTs.
    pub(super) accepts: bool,
    /// It gives such connections this buffer.
    pub(super) buf_alloc: u32,
    /// It answers a SHUTDOWN of both directions.
    pub(super) answers_close: bool,
}

/// Everything.
pub(super) struct World {
    pub(super) mux: Mux,
    poller: Arc<Poller>,
    listener: Listener,
    runtime: tokio::runtime::Runtime,
    outbox: VecDeque<(Header, Vec<u8>)>,
    pub(super) pairs: BTreeMap<u32, Pair>,
    pub(super) policy: Policy,
    now: Instant,
}

impl World {
    pub(super) fn new() -> Self {
        let poller = Arc::new(Poller::new().unwrap());
        let listeners = Arc::new(Listeners::default());
        Self {
            mux: Mux::new(GuestCid::DEFAULT, Arc::clone(&poller), Arc::clone(&listeners)),
            poller,
            listener: listeners.listen(LISTENED).unwrap(),
            runtime: tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap(),
            outbox: VecDeque::new(),
            pairs: BTreeMap::new(),
            policy: Policy { accepts: true, buf_alloc: 65_536, answers_close: true },
            now: Instant::now(),
        }
    }

    pub(super) fn host_connects(&mut self) -> u32 {
        let id = self.pairs.len() as u32 + 1;
        let (local, user) = nonblocking_pair().unwrap();
        let (reply, answer) = oneshot::channel();
        self.mux.connect(Connect { port: id, local, opening: Opening { reply, greet: false } });
        self.add(id, user, Some(answer));
        id
    }

    pub(super) fn guest_connects(&mut self, buf_alloc: u32) -> u32 {
        let id = self.pairs.len() as u32 + 1;
        let route = Route { guest: GuestCid::DEFAULT, guest_port: id, host_port: LISTENED };
        let request = Header { buf_alloc, ..from_guest(route, Op::Request) };
        self.mux.receive(&request, &[]);
        let listener = &mut self.listener;
        let stream = self.runtime.block_on(async { listener.accept().await.unwrap().into_std().unwrap() });
        self.add(id, stream, None);
        let end = &mut self.pairs.get_mut(&id).unwrap().guest;
        (end.route, end.buf_alloc) = (Some(route), buf_alloc);
        id
    }

    fn add(
        &mut self,
        id: u32,
        stream: UnixStream,
        answer: Option<oneshot::Receiver<Result<u32, ConnectError>>>,
    ) {
        let user = UserEnd {
            stream: Some(stream),
            answer,
            refused: false,
            sent_total: 0,
            read_total: 0,
            shut_write: false,
            eof: false,
        };
        self.pairs.insert(id, Pair { guest: GuestEnd::default(), user });
    }

    /// The device handles its sockets' events.
    pub(super) fn poll(&mut self) {
        for wakeup in self.poller.take() {
            if let Wakeup::Socket(slot, readiness) = wakeup {
                self.mux.ready(slot, readiness);
            }
        }
    }

    pub(super) fn pass_time(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.mux.tick(self.now);
    }

    /// The guest takes up to `count` packets into buffers of `space` bytes; gives how many there were.
    pub(super) fn deliver(&mut self, count: usize, space: usize) -> usize {
        for done in 0..count {
            let (mut first, mut second) = (vec![0; space / 3], vec![0; space - space / 3]);
            let slices = [VolatileSlice::from(&mut first[..]), VolatileSlice::from(&mut second[..])];
            let Some(header) = self.mux.next_packet(&slices) else {
                assert!(space == 0 || !self.mux.has_output(), "output that never comes");
                return done;
            };
            let data = [first, second].concat();
            assert!(header.len as usize <= space);
            self.hear(&header, &data[..header.len as usize]);
            self.transmit();
        }
        count
    }

    /// The guest's packets reach the device.
    pub(super) fn transmit(&mut self) {
        while self.mux.takes_packets() {
            let Some((header, mut data)) = self.outbox.pop_front() else { return };
            let (a, b) = data.split_at_mut(header.len as usize / 2);
            self.mux.receive(&header, &[VolatileSlice::from(a), VolatileSlice::from(b)]);
        }
    }

    fn hear(&mut self, header: &Header, data: &[u8]) {
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, 3, TYPE_STREAM));
        let id = header.dst_port;
        let pair = self.pairs.get_mut(&id).expect("a packet for a port that nobody used");
        let answer = pair.guest.hear(id, header, data, self.policy);
        self.outbox.extend(answer.map(|header| (header, Vec::new())));
    }

    pub(super) fn guest_sends(&mut self, id: u32, len: usize) {
        let Some(pair) = self.pairs.get_mut(&id) else { return };
        let end = &mut pair.guest;
        let len = len.min(end.credit()).min(64 * 1024);
        if !end.open || end.told.has(Directions::SEND) || len == 0 {
            return;
        }
        let data = bytes(id, true, end.sent_total, len);
        end.sent_total += len;
        end.sent = end.sent.wrapping_add(len as u32);
        let header = Header { len: len as u32, ..end.header(Op::Data) };
        self.outbox.push_back((header, data));
        self.transmit();
    }

    pub(super) fn guest_reads(&mut self, id: u32, len: usize) -> usize {
        let Some(pair) = self.pairs.get_mut(&id) else { return 0 };
        let end = &mut pair.guest;
        let len = len.min(end.unread.len());
        for got in end.unread.drain(..len) {
            assert_eq!(got, byte(id, false, end.read_total), "connection {id}, byte {}", end.read_total);
            end.read_total += 1;
        }
        end.read = end.read.wrapping_add(len as u32);
        if end.open && len > 0 {
            self.outbox.push_back((end.header(Op::CreditUpdate), Vec::new()));
            self.transmit();
        }
        len
    }

    pub(super) fn guest_shuts(&mut self, id: u32, directions: Directions) {
        let Some(pair) = self.pairs.get_mut(&id) else { return };
        let end = &mut pair.guest;
        if end.open {
            end.told |= directions;
            let header = Header { flags: end.told.flags(), ..end.header(Op::Shutdown) };
            self.outbox.push_back((header, Vec::new()));
            self.transmit();
        }
    }

    pub(super) fn guest_resets(&mut self, id: u32) {
        let Some(pair) = self.pairs.get_mut(&id) else { return };
        if pair.guest.open {
            (pair.guest.open, pair.guest.reset) = (false, true);
            self.outbox.push_back((pair.guest.header(Op::Reset), Vec::new()));
            self.transmit();
        }
    }

    pub(super) fn user_writes(&mut self, id: u32, len: usize) {
        let Some(Pair { user, .. }) = self.pairs.get_mut(&id) else { return };
        let Some(stream) = user.stream.as_mut().filter(|_| !user.shut_write) else { return };
        if let Ok(n) = stream.write(&bytes(id, false, user.sent_total, len)) {
            user.sent_total += n;
        }
    }

    /// Gives the bytes read.
    pub(super) fn user_reads(&mut self, id: u32, len: usize) -> usize {
        let Some(Pair { user, .. }) = self.pairs.get_mut(&id) else { return 0 };
        user.hear_answer();
        let Some(stream) = user.stream.as_mut() else { return 0 };
        let mut buffer = vec![0; len];
        match stream.read(&mut buffer) {
            Ok(n) => {
                user.eof |= n == 0 && len > 0;
                assert_eq!(buffer[..n], bytes(id, true, user.read_total, n));
                user.read_total += n;
                n
            }
            // ECONNRESET: the end came before the device had read all that the user wrote.
            Err(e) => {
                user.eof |= e.kind() == ErrorKind::ConnectionReset;
                assert!(user.eof || e.kind() == ErrorKind::WouldBlock, "{e}");
                0
            }
        }
    }

    pub(super) fn user_shuts_write(&mut self, id: u32) {
        let Some(Pair { user, .. }) = self.pairs.get_mut(&id) else { return };
        if let Some(stream) = &user.stream {
            user.shut_write = true;
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    pub(super) fn user_closes(&mut self, id: u32) {
        if let Some(pair) = self.pairs.get_mut(&id) {
            pair.user.hear_answer();
            pair.user.stream = None;
        }
    }

    /// Both sides read and move all they can until nothing moves.
    pub(super) fn settle(&mut self) {
        let ids: Vec<u32> = self.pairs.keys().copied().collect();
        loop {
            self.poll();
            let mut moved = self.deliver(usize::MAX, 5000);
            for id in &ids {
                moved += self.guest_reads(*id, usize::MAX) + self.user_reads(*id, 1 << 20);
            }
            self.transmit();
            if moved == 0 && self.outbox.is_empty() && !self.mux.has_output() {
                return;
            }
        }
    }
}

impl UserEnd {
    fn hear_answer(&mut self) {
        if let Some(Ok(answer)) = self.answer.as_mut().map(oneshot::Receiver::try_recv) {
            self.answer = None;
            self.refused = answer.is_err();
        }
    }

    /// A connect is still under way.
    pub(super) fn waits(&self) -> bool {
        self.answer.is_some()
    }
}

impl GuestEnd {
    fn header(&self, op: Op) -> Header {
        let route = self.route.expect("the connection has begun");
        Header { buf_alloc: self.buf_alloc, fwd_cnt: self.read, ..from_guest(route, op) }
    }

    fn credit(&self) -> usize {
        self.host_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.host_forwarded)) as usize
    }

    fn hear(&mut self, id: u32, header: &Header, data: &[u8], policy: Policy) -> Option<Header> {
        (self.host_buf_alloc, self.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
        match header.op().expect("the device sends known operations") {
            Op::Request => {
                assert!(self.route.is_none(), "a second REQUEST");
                self.route =
                    Some(Route { guest: GuestCid::DEFAULT, guest_port: id, host_port: header.src_port });
                (self.buf_alloc, self.open) = (policy.buf_alloc, policy.accepts);
                Some(self.header(if policy.accepts { Op::Response } else { Op::Reset }))
            }
            Op::Response => {
                assert!(!self.open && !self.reset);
                self.open = true;
                None
            }
            Op::Reset => {
                (self.open, self.reset) = (false, true);
                None
            }
            _ if !self.open => None,
            Op::Data => {
                assert!(!data.is_empty(), "an empty packet");
                assert!(!self.host_told.has(Directions::SEND), "data after its end on {id}");
                self.received = self.received.wrapping_add(data.len() as u32);
                assert!(self.received.wrapping_sub(self.read) <= self.buf_alloc, "past the credit on {id}");
                self.unread.extend(data);
                None
            }
            Op::Shutdown => {
                let directions = Directions::from_flags(header.flags);
                assert!(directions.has(self.host_told) && directions != self.host_told, "no news");
                self.host_told = directions;
                (policy.answers_close && directions == Directions::BOTH).then(|| {
                    (self.open, self.reset) = (false, true);
                    self.header(Op::Reset)
                })
            }
            Op::CreditUpdate => None,
            Op::CreditRequest => Some(self.header(Op::CreditUpdate)),
        }
    }
}

/// A packet of the guest without data, flags or credit.
pub(super) fn from_guest(route: Route, op: Op) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: route.guest_port,
        dst_port: route.host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        ..Header::default()
    }
}
