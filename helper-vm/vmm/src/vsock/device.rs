//! The vhost-user back-end: what QEMU negotiates, and the thread that all events meet in.
//!
//! ```text
//!   QEMU ──vhost-user socket── request thread (library): features, memory, rings
//!   guest ──kicks──┐
//!   Poller ────────┴── worker thread (library) ── handle_event ── Engine
//! ```
//!
//! Two threads, one lock: the worker holds the engine while it serves and takes the rings' locks after it;
//! the request thread never holds a ring while it asks for the engine.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringMutex};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmctr_proto::GuestCid;
use vmm_sys_util::epoll::EventSet;

use super::engine::{Engine, Served};
use super::inbox::Inbox;
use super::mux::Mux;
use super::poller::{Poller, Wakeup};
use super::ring::MAX_DESCRIPTORS;

/// Queues: to the guest, from the guest, events. The device has no event to send: what the guest offers
/// there stays the guest's. (QEMU keeps the event queue to itself.)
const QUEUES: usize = 3;
const RX: usize = 0;
const TX: usize = 1;

/// Token of the poller in the worker's epoll: beyond queues and the library's own exit event.
pub(super) const POLLER: u64 = QUEUES as u64 + 1;

/// QEMU starts the rings some messages after the features, and says nothing when it is done. Work that
/// waited for the rings (a VM that was paused) is looked after this often and this many times.
const START_CHECK: Duration = Duration::from_millis(5);
const START_CHECKS: u32 = 400;

/// How often lingering connections are looked at.
const LINGER_CHECK: Duration = Duration::from_secs(1);

/// The device.
#[derive(Debug)]
pub(super) struct Device {
    guest: GuestCid,
    poller: Arc<Poller>,
    inbox: Arc<Inbox>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    engine: Engine,
    start_checks: u32,
    armed: bool,
}

impl Device {
    pub(super) fn new(
        guest: GuestCid,
        mux: Mux,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        poller: Arc<Poller>,
        inbox: Arc<Inbox>,
    ) -> Self {
        let state = State { engine: Engine::new(mux, memory), start_checks: 0, armed: false };
        Self { guest, poller, inbox, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles everything but the guest's kicks. An error ends the worker: the device is closed.
    fn take_wakeups(&self, state: &mut State) -> io::Result<()> {
        for wakeup in self.poller.take() {
            match wakeup {
                Wakeup::Socket(slot, readiness) => state.engine.mux.ready(slot, readiness),
                Wakeup::Call => {
                    let connects = self.inbox.take().ok_or(io::ErrorKind::NotConnected)?;
                    connects.into_iter().for_each(|connect| state.engine.mux.connect(connect));
                }
                Wakeup::Timer => state.tick(),
            }
        }
        Ok(())
    }

    fn arm(&self, state: &mut State) {
        if state.armed {
            return;
        }
        if let Some(after) = state.next_check() {
            self.poller.arm(after);
            state.armed = true;
        }
    }
}

impl State {
    fn tick(&mut self) {
        self.armed = false;
        self.start_checks = self.start_checks.saturating_sub(1);
        self.engine.mux.tick(Instant::now());
    }

    fn serve(&mut self, rx: &VringMutex, tx: &VringMutex) -> Served {
        let served = self.engine.serve(rx, tx);
        if served != Served::NotReady {
            self.start_checks = 0;
        }
        served
    }

    fn next_check(&self) -> Option<Duration> {
        if self.start_checks > 0 {
            return Some(START_CHECK);
        }
        self.engine.mux.lingers().then_some(LINGER_CHECK)
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_DESCRIPTORS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// QEMU starts the device, for the first time or again.
    fn acked_features(&self, _features: u64) {
        let mut state = self.lock();
        state.start_checks = START_CHECKS;
        state.armed = true;
        self.poller.arm(START_CHECK);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    /// The queues know.
    fn set_event_idx(&self, _enabled: bool) {}

    /// The guest's context ID, all that the configuration space holds.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = u64::from(u32::from(self.guest)).to_le_bytes();
        let start = offset as usize;
        let end = start.saturating_add(size as usize);
        config.get(start..end).map(<[u8]>::to_vec).unwrap_or_default()
    }

    /// The engine sees the new memory through the handle it shares with the library.
    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let mut state = self.lock();
        if u64::from(event) == POLLER {
            self.take_wakeups(&mut state)?;
        }
        if state.serve(&vrings[RX], &vrings[TX]) == Served::More {
            self.poller.wake();
        }
        self.arm(&mut state);
        Ok(())
    }
}
