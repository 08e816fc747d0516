//! Requests that wait for a lock (SETLKW), and the one thread that tries them again.
//!
//! ```text
//!   SETLKW ──> tried at once ── EAGAIN ──> queue ──> tried when a lock goes, and now and then ──> answered
//!                                            └── INTERRUPT ──> answered EINTR
//! ```
//!
//! Invariant: each request that came is answered once, in any order; the queue is bounded.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::locks::Wish;
use super::message::Answer;
use super::server::Server;
use crate::export::wire::stream::Stream;

/// How soon a lock is noticed that a process in the guest gave up.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How many may wait at once.
const MOST: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Waits {
    queue: Mutex<VecDeque<Waiting>>,
    changed: Condvar,
}

/// A request that waits. Its stream is kept so that the answer goes where it came from.
#[derive(Debug)]
struct Waiting {
    unique: u64,
    wish: Wish,
    stream: Arc<Replies>,
}

/// Where the answers of one waiting lane go.
#[derive(Debug)]
pub(super) struct Replies {
    pub(super) stream: Stream,
    writing: Mutex<()>,
    ended: AtomicBool,
}

impl Replies {
    pub(super) fn new(stream: Stream) -> Arc<Self> {
        Arc::new(Self { stream, writing: Mutex::new(()), ended: AtomicBool::new(false) })
    }

    pub(super) fn send(&self, message: &[u8]) {
        let _writing = lock(&self.writing);
        if self.stream.write_all(message).is_err() {
            self.ended.store(true, Ordering::Relaxed);
        }
    }

    fn answer(&self, unique: u64, result: Result<(), Errno>) {
        let mut answer = Answer::default();
        answer.clear();
        self.send(answer.finish(unique, result));
    }
}

impl Waits {
    /// Takes a request in. It is answered when the lock is there.
    pub(super) fn add(&self, server: &Server, unique: u64, wish: Wish, stream: &Arc<Replies>) {
        let result = match server.lock(&wish) {
            Err(Errno::AGAIN) => {
                let mut queue = lock(&self.queue);
                if queue.len() < MOST {
                    queue.push_back(Waiting { unique, wish, stream: Arc::clone(stream) });
                    self.changed.notify_all();
                    return;
                }
                Err(Errno::NOLCK)
            }
            other => other,
        };
        stream.answer(unique, result);
    }

    /// The caller of a waiting request got a signal.
    pub(super) fn interrupt(&self, unique: u64, stream: &Arc<Replies>) {
        let mut queue = lock(&self.queue);
        let found = queue.iter().position(|one| one.unique == unique && Arc::ptr_eq(&one.stream, stream));
        if let Some(waiting) = found.and_then(|at| queue.remove(at)) {
            drop(queue);
            waiting.stream.answer(unique, Err(Errno::INTR));
        }
    }

    /// Drops what a lane still waited for: nobody is there to hear of it.
    pub(super) fn end(&self, stream: &Arc<Replies>) {
        stream.ended.store(true, Ordering::Relaxed);
        lock(&self.queue).retain(|one| !Arc::ptr_eq(&one.stream, stream));
    }

    /// A lock may have gone.
    pub(super) fn something_changed(&self) {
        self.changed.notify_all();
    }

    /// Tries those who wait, first come first served, until the lane ends.
    pub(super) fn run(&self, server: &Server, lane: &Replies) {
        while !lane.ended.load(Ordering::Relaxed) {
            self.try_all(server);
            let queue = lock(&self.queue);
            let pause = if queue.is_empty() { Duration::from_secs(1) } else { LOOK_AGAIN };
            drop(self.changed.wait_timeout(queue, pause).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn try_all(&self, server: &Server) {
        let mut done = Vec::new();
        // Under the lock, so that an interrupt finds a request either here or answered.
        lock(&self.queue).retain(|waiting| match server.lock(&waiting.wish) {
            Err(Errno::AGAIN) => true,
            result => {
                done.push((waiting.unique, Arc::clone(&waiting.stream), result));
                false
            }
        });
        for (unique, stream, result) in done {
            stream.answer(unique, result);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
