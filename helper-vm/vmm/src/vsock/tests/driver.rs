//! A guest's driver: queues in a piece of memory, and the engine behind them.
//!
//! ```text
//!   0x0000  rx: descriptors, 0x2000 available ring, 0x3000 used ring          RING entries each
//!   0x4000  tx: descriptors, 0x6000 available ring, 0x7000 used ring
//!   0x10000 tx buffers, 0x40000 rx buffers                                    SLOT bytes per descriptor
//!   0x20000 indirect table, 0x30000 its bytes
//! ```

use std::sync::Arc;

use vhost_user_backend::{VringMutex, VringT};
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmctr_proto::GuestCid;

use crate::vsock::engine::{Engine, Served};
use crate::vsock::listen::{Listener, Listeners};
use crate::vsock::mux::Mux;
use crate::vsock::packet::{HEADER_LEN, Header};
use crate::vsock::poller::{Poller, Wakeup};

use super::peer::LISTENED;

/// Bytes of guest memory.
pub(super) const MEMORY: u64 = 0x80_000;

/// Entries of a ring.
pub(super) const RING: u16 = 16;

/// Bytes behind each descriptor.
pub(super) const SLOT: u64 = 0x1000;

/// One of the two queues.
pub(super) struct Ring {
    pub(super) vring: VringMutex,
    pub(super) base: u64,
    buffers: u64,
    next: u16,
    available: u16,
    used: u16,
}

/// The driver.
pub(super) struct Driver {
    pub(super) memory: GuestMemoryAtomic<GuestMemoryMmap>,
    pub(super) rx: Ring,
    pub(super) tx: Ring,
    pub(super) engine: Engine,
    pub(super) listener: Listener,
    poller: Arc<Poller>,
}

impl Ring {
    fn new(memory: &GuestMemoryAtomic<GuestMemoryMmap>, base: u64, buffers: u64) -> Self {
        let vring = VringMutex::new(memory.clone(), 256).unwrap();
        let ring = Self { vring, base, buffers, next: 0, available: 0, used: 0 };
        ring.start(0);
        ring
    }

    /// What QEMU does when the driver is ready.
    pub(super) fn start(&self, position: u16) {
        self.vring.set_queue_size(RING);
        self.vring.set_queue_info(self.base, self.base + 0x2000, self.base + 0x3000).unwrap();
        self.vring.set_queue_next_avail(position);
        self.vring.set_queue_next_used(position);
        self.vring.set_queue_event_idx(true);
        self.vring.set_queue_ready(true);
        self.vring.set_enabled(true);
    }

    pub(super) fn stop(&self) {
        self.vring.set_queue_ready(false);
        self.vring.set_enabled(false);
    }

    /// The driver forgets everything and begins at zero.
    fn reset(&mut self, memory: &GuestMemoryMmap) {
        memory.write_slice(&[0; 0x4000], GuestAddress(self.base)).unwrap();
        (self.next, self.available, self.used) = (0, 0, 0);
        self.start(0);
    }

    /// Makes a chain of `(address, length)` available; gives its head.
    pub(super) fn offer(&mut self, memory: &GuestMemoryMmap, chain: &[(u64, u32)], write: bool) -> u16 {
        let head = self.next;
        for (i, (address, len)) in chain.iter().enumerate() {
            let next = (self.next + 1) % RING;
            let mut flags = if write { VRING_DESC_F_WRITE } else { 0 };
            if i + 1 < chain.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            self.write_descriptor(memory, self.next, (*address, *len), flags as u16, next);
            self.next = next;
        }
        self.publish(memory, head);
        head
    }

    pub(super) fn write_descriptor(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        write_descriptor(memory, self.base, index, (address, len), flags, next);
    }

    pub(super) fn publish(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let ring = self.base + 0x2000;
        let entry = ring + 4 + u64::from(self.available % RING) * 2;
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(memory, self.available);
    }

    pub(super) fn set_available(&self, memory: &GuestMemoryMmap, index: u16) {
        memory.write_obj(index, GuestAddress(self.base + 0x2002)).unwrap();
    }

    /// Chains that came back since the last call: head and length.
    pub(super) fn take_used(&mut self, memory: &GuestMemoryMmap) -> Vec<(u32, u32)> {
        let ring = self.base + 0x3000;
        let index: u16 = memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut back = Vec::new();
        while self.used != index {
            let entry = GuestAddress(ring + 4 + u64::from(self.used % RING) * 8);
            let raw: u64 = memory.read_obj(entry).unwrap();
            back.push((raw as u32, (raw >> 32) as u32));
            self.used = self.used.wrapping_add(1);
        }
        back
    }

    fn slot(&self, index: u16) -> u64 {
        self.buffers + u64::from(index % RING) * SLOT
    }
}

fn write_descriptor(
    memory: &GuestMemoryMmap,
    table: u64,
    index: u16,
    (address, len): (u64, u32),
    flags: u16,
    next: u16,
) {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    memory.write_slice(&raw, GuestAddress(table + u64::from(index) * 16)).unwrap();
}

impl Driver {
    pub(super) fn new() -> Self {
        let ranges = [(GuestAddress(0), MEMORY as usize)];
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let poller = Arc::new(Poller::new().unwrap());
        let listeners = Arc::new(Listeners::default());
        let mux = Mux::new(GuestCid::DEFAULT, Arc::clone(&poller), Arc::clone(&listeners));
        Self {
            rx: Ring::new(&memory, 0, 0x40_000),
            tx: Ring::new(&memory, 0x4000, 0x10_000),
            engine: Engine::new(mux, memory.clone()),
            listener: listeners.listen(LISTENED).unwrap(),
            memory,
            poller,
        }
    }

    /// Sends a packet spread over descriptors of the given lengths; the last takes the rest.
    pub(super) fn send(&mut self, header: &Header, data: &[u8], lengths: &[usize]) {
        let memory = self.memory.memory();
        let packet = [&header.encode()[..], data].concat();
        let mut rest = &packet[..];
        let mut chain = Vec::new();
        for (i, len) in lengths.iter().chain([&usize::MAX]).enumerate() {
            let (part, tail) = rest.split_at((*len).min(rest.len()));
            let address = self.tx.slot(self.tx.next + i as u16);
            memory.write_slice(part, GuestAddress(address)).unwrap();
            chain.push((address, part.len() as u32));
            rest = tail;
        }
        self.tx.offer(&memory, &chain, false);
    }

    /// Sends a packet through an indirect table: one descriptor for the header, then one per byte of data.
    pub(super) fn send_indirect(&mut self, header: &Header, data: &[u8]) {
        const TABLE: u64 = 0x20_000;
        const BYTES: u64 = 0x30_000;
        let memory = self.memory.memory();
        memory.write_slice(&[&header.encode()[..], data].concat(), GuestAddress(BYTES)).unwrap();
        let last = data.len() as u16;
        for index in 0..=last {
            let start = if index == 0 { 0 } else { HEADER_LEN as u64 + u64::from(index) - 1 };
            let len = if index == 0 { HEADER_LEN as u32 } else { 1 };
            let flags = if index < last { VRING_DESC_F_NEXT as u16 } else { 0 };
            write_descriptor(&memory, TABLE, index, (BYTES + start, len), flags, index + 1);
        }
        let head = self.tx.next;
        let len = (u32::from(last) + 1) * 16;
        self.tx.write_descriptor(&memory, head, (TABLE, len), VRING_DESC_F_INDIRECT as u16, 0);
        self.tx.next = (head + 1) % RING;
        self.tx.publish(&memory, head);
    }

    /// Offers a buffer for one packet, spread over descriptors of the given lengths.
    pub(super) fn offer_space(&mut self, lengths: &[u32]) -> u16 {
        let memory = self.memory.memory();
        let chain: Vec<(u64, u32)> = lengths
            .iter()
            .enumerate()
            .map(|(i, len)| (self.rx.slot(self.rx.next + i as u16), *len))
            .collect();
        self.rx.offer(&memory, &chain, true)
    }

    pub(super) fn serve(&mut self) -> Served {
        for wakeup in self.poller.take() {
            if let Wakeup::Socket(slot, readiness) = wakeup {
                self.engine.mux.ready(slot, readiness);
            }
        }
        self.engine.serve(&self.rx.vring, &self.tx.vring)
    }

    /// The packets in the buffers that came back; their descriptors must lie in a row.
    pub(super) fn received(&mut self, lengths: &[u32]) -> Vec<(Header, Vec<u8>)> {
        let memory = self.memory.memory();
        let back = self.rx.take_used(&memory);
        back.iter().map(|(head, len)| self.packet(*head as u16, *len as usize, lengths)).collect()
    }

    fn packet(&self, head: u16, len: usize, lengths: &[u32]) -> (Header, Vec<u8>) {
        let memory = self.memory.memory();
        let mut bytes = Vec::new();
        for (i, part) in lengths.iter().enumerate() {
            let mut buffer = vec![0; (*part as usize).min(len - bytes.len())];
            memory.read_slice(&mut buffer, GuestAddress(self.rx.slot(head + i as u16))).unwrap();
            bytes.extend(buffer);
        }
        let data = bytes.split_off(HEADER_LEN);
        (Header::decode(&bytes.try_into().unwrap()), data)
    }

    /// The guest reboots, or loads its driver again.
    pub(super) fn reset(&mut self) {
        let memory = self.memory.memory();
        self.rx.reset(&memory);
        self.tx.reset(&memory);
    }
}
