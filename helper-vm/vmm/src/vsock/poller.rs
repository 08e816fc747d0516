//! What wakes the device apart from the guest: one epoll descriptor over the connections' sockets, a wake-up
//! call from other threads, and a timer. The descriptor itself sits in the vhost-user back-end's own epoll.
//!
//! ```text
//!   back-end's epoll ── kicks of the guest's queues
//!                    └─ Poller ── sockets (edge-triggered, token = slot of the connection)
//!                              ├─ wake   eventfd
//!                              └─ timer  timerfd, one shot
//! ```
//!
//! A socket leaves the set by being closed; it has no other descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use super::local::Readiness;

const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// Events taken per call.
const BATCH: usize = 64;

/// Why the device woke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wakeup {
    /// [`Poller::wake`].
    Call,
    /// The time of [`Poller::arm`] is over.
    Timer,
    /// The socket of the connection in this slot.
    Socket(usize, Readiness),
}

/// The set of event sources.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: OwnedFd,
    wake: OwnedFd,
    timer: TimerFd,
}

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        let poller = Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            timer: TimerFd::new(
                ClockId::CLOCK_MONOTONIC,
                TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
            )?,
        };
        epoll::add(&poller.epoll, &poller.wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        epoll::add(&poller.epoll, &poller.timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        Ok(poller)
    }

    /// Watches a connection's socket.
    pub(super) fn watch(&self, slot: usize, socket: impl AsFd) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, socket, EventData::new_u64(slot as u64), flags)?)
    }

    /// Wakes the device from any thread.
    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then the device is about to wake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Sets the timer; an earlier setting is lost.
    pub(super) fn arm(&self, after: Duration) {
        let once = Expiration::OneShot(TimeSpec::from_duration(after));
        // Fails only for times that are none.
        let _ = self.timer.set(once, TimerSetTimeFlags::empty());
    }

    /// Takes what has happened, without waiting.
    pub(super) fn take(&self) -> Vec<Wakeup> {
        let mut events = Vec::with_capacity(BATCH);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&now)).is_err() {
            return Vec::new();
        }
        events.iter().map(|event| self.wakeup(event)).collect()
    }

    fn wakeup(&self, event: &Event) -> Wakeup {
        match event.data.u64() {
            WAKE => {
                self.clear(&self.wake);
                Wakeup::Call
            }
            TIMER => {
                self.clear(&self.timer);
                Wakeup::Timer
            }
            slot => Wakeup::Socket(slot as usize, readiness(event.flags)),
        }
    }

    fn clear(&self, counter: impl AsFd) {
        // Nonblocking; a counter that is zero already is as good as one read.
        let _ = rustix::io::read(counter, &mut [0_u8; 8]);
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn readiness(flags: EventFlags) -> Readiness {
    let over = EventFlags::HUP | EventFlags::ERR;
    Readiness {
        readable: flags.intersects(EventFlags::IN | EventFlags::RDHUP | over),
        writable: flags.intersects(EventFlags::OUT | over),
        hangup: flags.intersects(EventFlags::RDHUP | over),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn calls_are_taken_once() {
        let poller = Poller::new().unwrap();
        poller.wake();
        poller.wake();
        assert_eq!(poller.take(), [Wakeup::Call]);
        assert_eq!(poller.take(), []);
    }

    #[test]
    fn the_timer_fires_once() {
        let poller = Poller::new().unwrap();
        poller.arm(Duration::from_millis(1));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(poller.take(), [Wakeup::Timer]);
        assert_eq!(poller.take(), []);
    }

    #[test]
    fn a_socket_reports_each_change_once_and_its_close() {
        let (device, mut user) = UnixStream::pair().unwrap();
        let poller = Poller::new().unwrap();
        poller.watch(5, &device).unwrap();
        let event = |readable, hangup| Wakeup::Socket(5, Readiness { readable, writable: true, hangup });
        assert_eq!(poller.take(), [event(false, false)]);
        assert_eq!(poller.take(), []);
        user.write_all(b"x").unwrap();
        assert_eq!(poller.take(), [event(true, false)]);
        drop(user);
        assert_eq!(poller.take(), [event(true, true)]);
    }
}
