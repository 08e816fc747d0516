//! The table of connections with its three edges: the guest's packets, the sockets' events, the users.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tokio::sync::oneshot;
use vm_memory::VolatileSlice;
use vmctr_proto::GuestCid;

use super::peer::{LISTENED, from_guest};
use crate::vsock::connection::Opening;
use crate::vsock::error::ConnectError;
use crate::vsock::listen::{Listener, Listeners};
use crate::vsock::mux::{Connect, Mux, nonblocking_pair};
use crate::vsock::packet::{Header, Op, Route};
use crate::vsock::poller::{Poller, Wakeup};

/// Where the host's own ports begin.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;

/// The table and its edges.
pub(super) struct Table {
    pub(super) mux: Mux,
    poller: Arc<Poller>,
    pub(super) listener: Listener,
}

impl Table {
    pub(super) fn new() -> Self {
        let poller = Arc::new(Poller::new().unwrap());
        let listeners = Arc::new(Listeners::default());
        let mux = Mux::new(GuestCid::DEFAULT, Arc::clone(&poller), Arc::clone(&listeners));
        Self { mux, poller, listener: listeners.listen(LISTENED).unwrap() }
    }

    /// The guest sends a packet with as much data as it says.
    pub(super) fn send(&mut self, header: &Header) {
        let mut data = vec![0x5a; header.len as usize];
        self.mux.receive(header, &[VolatileSlice::from(&mut data[..])]);
    }

    /// The guest takes a packet.
    pub(super) fn next(&mut self) -> Option<Header> {
        let mut space = vec![0; 4096];
        self.mux.next_packet(&[VolatileSlice::from(&mut space[..])])
    }

    /// All that the guest is owed now.
    pub(super) fn drain(&mut self) -> Vec<Header> {
        std::iter::from_fn(|| self.next()).collect()
    }

    /// The device handles its sockets' events.
    pub(super) fn poll(&mut self) {
        loop {
            let wakeups = self.poller.take();
            if wakeups.is_empty() {
                return;
            }
            for wakeup in wakeups {
                let Wakeup::Socket(slot, readiness) = wakeup else { continue };
                self.mux.ready(slot, readiness);
            }
        }
    }

    /// A connection that the guest opened; its RESPONSE is taken.
    pub(super) async fn connected(&mut self) -> UnixStream {
        self.send(&packet(Op::Request));
        let stream = self.listener.accept().await.unwrap().into_std().unwrap();
        assert_eq!(ops(&self.drain()), [Op::Response]);
        stream
    }

    /// The host connects to port 1, the host port being [`FIRST_HOST_PORT`] and up.
    pub(super) fn connect(
        &mut self,
        greet: bool,
    ) -> (UnixStream, oneshot::Receiver<Result<u32, ConnectError>>) {
        let (local, user) = nonblocking_pair().unwrap();
        let (reply, answer) = oneshot::channel();
        self.mux.connect(Connect { port: 1, local, opening: Opening { reply, greet } });
        (user, answer)
    }
}

/// A packet of the guest's port 5 to the listened one.
pub(super) fn packet(op: Op) -> Header {
    let route = Route { guest: GuestCid::DEFAULT, guest_port: 5, host_port: LISTENED };
    Header { buf_alloc: 1 << 20, ..from_guest(route, op) }
}

pub(super) fn ops(headers: &[Header]) -> Vec<Op> {
    headers.iter().map(|h| h.op().unwrap()).collect()
}
