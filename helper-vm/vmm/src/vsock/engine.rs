//! Moves packets between the guest's queues and the table of connections.
//!
//! ```text
//!            ┌────────────── one round, repeated while it moves anything ──────────────┐
//!   tx queue ─> take: header + data ─> Mux::receive      Mux::next_packet ─> give ─> rx queue
//!            └─────────── then: ask for kicks, and look again before sleeping ─────────┘
//! ```
//!
//! - Taking stops while the guest is owed too many resets; giving stops when it offers no buffers.
//!   Neither waits for the other, so both directions run at once.
//! - A serve is bounded; what is left over is served after other events had their turn.
//! - A ring that makes no sense is left alone until the driver is reset. A reset shows in the queues'
//!   positions, which nobody but us moves otherwise; a pause of the VM keeps them, and connections live on.

use std::time::Instant;

use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::mux::Mux;
use super::packet::{HEADER_LEN, Header};
use super::ring::{BadChain, Buffers, RingError, Side, give_back, pop};
use crate::error_chain;
use crate::log_rate::LogRate;

/// Chains of either queue per round.
const BATCH: usize = 128;

/// Rounds per serve.
const ROUNDS: usize = 8;

/// How a serve ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Nothing is left to do.
    Idle,
    /// There is more: serve again.
    More,
    /// The guest's driver has not set the queues up, or the VM is stopped.
    NotReady,
}

/// Table of connections and the way to the guest.
#[derive(Debug)]
pub(super) struct Engine {
    /// The connections.
    pub(super) mux: Mux,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    positions: Option<(u16, u16)>,
    broken: bool,
    complaints: LogRate,
}

impl Engine {
    pub(super) fn new(mux: Mux, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Self {
        Self { mux, memory, positions: None, broken: false, complaints: LogRate::new(Instant::now()) }
    }

    /// Moves what can be moved.
    pub(super) fn serve(&mut self, rx: &VringMutex, tx: &VringMutex) -> Served {
        let memory = self.memory.memory();
        let (mut rx, mut tx) = (rx.get_mut(), tx.get_mut());
        if !usable(&rx) || !usable(&tx) {
            return Served::NotReady;
        }
        self.notice_reset(&rx, &tx);
        if self.broken {
            return Served::Idle;
        }
        let result = self.exchange(&memory, &mut rx, &mut tx);
        self.positions = Some(positions(&rx, &tx));
        result.unwrap_or_else(|error| self.give_up(&error))
    }

    fn notice_reset(&mut self, rx: &VringState, tx: &VringState) {
        let now = positions(rx, tx);
        if self.positions.is_some_and(|last| last != now) {
            tracing::debug!("the guest's vsock driver was reset");
            self.mux.reset();
            self.broken = false;
        }
        self.positions = Some(now);
    }

    fn give_up(&mut self, error: &RingError) -> Served {
        let line =
            format!("the guest broke its vsock queues; its connections are closed: {}", error_chain(error));
        // It can reset its driver and break them again.
        self.complaints.admit(Instant::now(), &line).for_each(|line| tracing::warn!("{line}"));
        self.broken = true;
        self.mux.reset();
        Served::Idle
    }

    fn exchange(
        &mut self,
        memory: &GuestMemoryMmap,
        rx: &mut VringState,
        tx: &mut VringState,
    ) -> Result<Served, RingError> {
        for _ in 0..ROUNDS {
            let taken = self.take(memory, tx)?;
            let given = self.give(memory, rx)?;
            notify(memory, tx, taken)?;
            notify(memory, rx, given)?;
            if taken + given == 0 && !self.look_again(memory, rx, tx)? {
                return Ok(Served::Idle);
            }
        }
        Ok(Served::More)
    }

    /// Packets from the guest; gives the number of chains.
    fn take(&mut self, memory: &GuestMemoryMmap, tx: &mut VringState) -> Result<usize, RingError> {
        let queue = tx.get_queue_mut();
        for count in 0..BATCH {
            if !self.mux.takes_packets() {
                return Ok(count);
            }
            let Some(chain) = pop(queue, memory)? else { return Ok(count) };
            let head = chain.head_index();
            match Buffers::gather(chain, memory, Side::Readable).and_then(split_packet) {
                Ok((header, Some(data))) => self.mux.receive(&header, data.slices()),
                Ok((header, None)) => self.mux.receive_broken(&header),
                Err(BadChain) => tracing::debug!("dropped a chain that holds no vsock packet"),
            }
            give_back(queue, memory, head, 0)?;
        }
        Ok(BATCH)
    }

    /// Packets to the guest; gives the number of chains.
    fn give(&mut self, memory: &GuestMemoryMmap, rx: &mut VringState) -> Result<usize, RingError> {
        let queue = rx.get_queue_mut();
        for count in 0..BATCH {
            if !self.mux.has_output() {
                return Ok(count);
            }
            let Some(chain) = pop(queue, memory)? else { return Ok(count) };
            let head = chain.head_index();
            match Buffers::gather(chain, memory, Side::Writable).and_then(|space| self.fill(space)) {
                Ok(Some(len)) => give_back(queue, memory, head, len)?,
                Ok(None) => {
                    queue.go_to_previous_position();
                    return Ok(count);
                }
                Err(BadChain) => give_back(queue, memory, head, 0)?,
            }
        }
        Ok(BATCH)
    }

    /// Puts the next packet into a chain; gives its length. Space for a header only is bad when data waits.
    fn fill(&mut self, mut space: Buffers<'_>) -> Result<Option<usize>, BadChain> {
        let header_space = space.split_off_header()?;
        match self.mux.next_packet(space.slices()) {
            Some(header) => {
                header_space.write_header(&header);
                Ok(Some(HEADER_LEN + header.len as usize))
            }
            None if space.len() == 0 => Err(BadChain),
            None => Ok(None),
        }
    }

    /// Asks for the kicks that matter; true when the guest was faster.
    fn look_again(
        &self,
        memory: &GuestMemoryMmap,
        rx: &mut VringState,
        tx: &mut VringState,
    ) -> Result<bool, RingError> {
        let mut more = false;
        if self.mux.takes_packets() {
            more |= tx.get_queue_mut().enable_notification(memory).map_err(RingError::Used)?;
        }
        if self.mux.has_output() {
            more |= rx.get_queue_mut().enable_notification(memory).map_err(RingError::Used)?;
        }
        Ok(more)
    }
}

fn usable(vring: &VringState) -> bool {
    vring.is_enabled() && vring.get_queue().ready()
}

fn positions(rx: &VringState, tx: &VringState) -> (u16, u16) {
    (rx.get_queue().next_avail(), tx.get_queue().next_avail())
}

/// Header and data, or the header alone when it counts more data than there is.
fn split_packet(mut buffers: Buffers<'_>) -> Result<(Header, Option<Buffers<'_>>), BadChain> {
    let header = buffers.take_header()?;
    let whole = buffers.truncate(header.len as usize).is_ok();
    Ok((header, whole.then_some(buffers)))
}

/// Interrupts the guest if chains went back and it wants to know.
fn notify(memory: &GuestMemoryMmap, vring: &mut VringState, chains: usize) -> Result<(), RingError> {
    if chains > 0 && vring.get_queue_mut().needs_notification(memory).map_err(RingError::Used)? {
        // The other end of the eventfd is QEMU's; when it is gone the connection's end follows.
        let _ = vring.signal_used_queue();
    }
    Ok(())
}
