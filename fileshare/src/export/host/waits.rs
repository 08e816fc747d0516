//! Requests that may wait without limit, on a stream of their own: those for locks, and the owner's own sync.
//!
//! Invariants:
//! 1. Each is answered once, by the guest, or by us when its caller got a signal and the guest does not let go in
//!    time, or when the guest is lost.
//! 2. No interrupt is sent before what it interrupts.
//! 3. A lock that comes when its caller was told that it does not is given back.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::device::Device;
use super::question::put_u32_at;
use super::shared::{Lost, Shared, lock};
use super::talk::message;
use crate::export::wire::abi::{IN_HEADER, InHeader, OUT_HEADER, OutHeader, ROOT_ID, op};
use crate::export::wire::codec::{Malformed, Put, Take};
use crate::export::wire::stream::{Inbox, Stream, StreamError};

/// How long the guest may take to let an interrupted request go.
const LET_GO: Duration = Duration::from_secs(1);

/// Requests that were answered here and may yet be answered by the guest, and our own that it has not answered. More
/// of either is a broken guest.
const MOST_LATE: usize = 1024;

/// Interrupts that are kept for requests to come.
const MOST_EARLY: usize = 64;

/// Where in a `fuse_lk_in` the lock's kind is.
const LK_TYPE: usize = 32;

/// The kernel's own numbers are even and count up from 2.
const OWN: u64 = u64::MAX - 1;

/// What waits.
#[derive(Debug)]
pub(super) struct Waits {
    stream: Stream,
    writing: Mutex<()>,
    pending: Mutex<Pending>,
    owns: AtomicU64,
}

#[derive(Debug, Default)]
struct Pending {
    by_unique: HashMap<u64, Waiting>,
    late: HashMap<u64, Asked>,
    /// Interrupts of requests that are not here: done already, or just being taken by another thread.
    early: VecDeque<u64>,
}

#[derive(Debug)]
enum Waiting {
    /// The kernel takes an answer only from the descriptor that it gave the request to.
    Kernel {
        device: Arc<Device>,
        interrupted: Option<Instant>,
        asked: Asked,
    },
    Own(SyncSender<i32>),
    /// A sign of life, asked for then.
    Sign(Instant),
}

/// A lock that is waited for.
#[derive(Debug)]
struct Asked {
    /// As the kernel sent it.
    header: InHeader,
    /// As the guest got it.
    message: Box<[u8]>,
}

impl Waits {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, writing: Mutex::default(), pending: Mutex::default(), owns: AtomicU64::new(OWN) }
    }

    pub(super) fn shutdown(&self) {
        self.stream.shutdown();
    }

    fn send(&self, shared: &Shared, message: &[u8]) {
        let _writing = lock(&self.writing);
        self.write(shared, message);
    }

    /// For who holds `writing`.
    fn write(&self, shared: &Shared, message: &[u8]) {
        if self.stream.write_all(message).is_err() {
            shared.give_up(Lost::Closed);
        }
    }

    /// Takes over a request of the kernel's.
    pub(super) fn add(&self, shared: &Shared, device: &Arc<Device>, header: &InHeader, message: &[u8]) {
        let (unique, asked) = (header.unique, Asked { header: *header, message: message.into() });
        let waiting = Waiting::Kernel { device: Arc::clone(device), interrupted: None, asked };
        let writing = lock(&self.writing);
        let mut pending = lock(&self.pending);
        pending.by_unique.insert(unique, waiting);
        let interrupted = pending.early.contains(&unique);
        drop(pending);
        self.write(shared, message);
        drop(writing);
        if interrupted {
            self.interrupt(shared, unique);
        }
        // The guest may have been lost meanwhile, with nobody left to answer.
        if shared.is_lost() {
            self.answer_all();
        }
    }

    /// The caller of a request got a signal.
    pub(super) fn interrupt(&self, shared: &Shared, unique: u64) {
        let mut pending = lock(&self.pending);
        match pending.by_unique.get_mut(&unique) {
            Some(Waiting::Kernel { interrupted, .. }) => {
                interrupted.get_or_insert_with(Instant::now);
            }
            _ => {
                pending.early.push_back(unique);
                if pending.early.len() > MOST_EARLY {
                    pending.early.pop_front();
                }
                return;
            }
        }
        drop(pending);
        self.send(shared, &own_message(op::INTERRUPT, unique | 1, unique));
    }

    /// Asks the guest for a sign of life, unless one is awaited; for how long it is.
    pub(super) fn ask_for_sign(&self, shared: &Shared) -> Duration {
        let mut pending = lock(&self.pending);
        let awaited = pending.by_unique.values().find_map(|waiting| match waiting {
            Waiting::Sign(since) => Some(since.elapsed()),
            _ => None,
        });
        if let Some(awaited) = awaited {
            return awaited;
        }
        let unique = self.owns.fetch_sub(2, Ordering::Relaxed);
        pending.by_unique.insert(unique, Waiting::Sign(Instant::now()));
        drop(pending);
        self.send(shared, &own_message(op::SIGN, unique, 0));
        Duration::ZERO
    }

    /// Asks the guest to bring all it has to its disks.
    pub(super) fn sync(&self, shared: &Shared) -> Receiver<i32> {
        let (unique, receiver) = self.own();
        self.send(shared, &own_message(op::SYNCFS, unique, 0));
        receiver
    }

    /// Hands the guest's answers on until the stream ends, then answers what is left.
    pub(super) fn run(&self, shared: &Shared) {
        let mut inbox = Inbox::default();
        let lost = loop {
            match inbox.next(&self.stream, OUT_HEADER, OUT_HEADER).map(|message| self.take(shared, message)) {
                Ok(Ok(())) => {}
                Ok(Err(malformed)) => break Lost::Broken(malformed.to_string()),
                Err(StreamError::Length(length)) => {
                    break Lost::Broken(format!("an answer of {length} bytes"));
                }
                Err(_) => break Lost::Closed,
            }
        };
        shared.give_up(lost);
        self.answer_all();
    }

    fn answer_all(&self) {
        let left = std::mem::take(&mut lock(&self.pending).by_unique);
        left.into_iter().for_each(|(unique, waiting)| waiting.answer(unique, libc::EIO));
    }

    fn take(&self, shared: &Shared, message: &[u8]) -> Result<(), Malformed> {
        let header = OutHeader::take(&mut Take::new(message))?;
        let errno = match header.error {
            0 => 0,
            error if (-133..0).contains(&error) && -error != libc::ENOSYS => -error,
            _ => return Err(Malformed("an error that is none")),
        };
        let mut pending = lock(&self.pending);
        match pending.by_unique.remove(&header.unique) {
            Some(waiting) => {
                drop(pending);
                if let Waiting::Kernel { asked, .. } = &waiting {
                    shared.note_lock(&asked.header, &asked.message);
                }
                waiting.answer(header.unique, errno);
            }
            None => {
                let late = pending.late.remove(&header.unique);
                drop(pending);
                let asked = late.ok_or(Malformed("an answer to no request"))?;
                if errno == 0 {
                    self.give_back(shared, &asked);
                }
            }
        }
        Ok(())
    }

    /// Drops a lock that nobody knows of.
    fn give_back(&self, shared: &Shared, asked: &Asked) {
        let (unique, _) = self.own();
        let guests = InHeader::take(&mut Take::new(&asked.message)).unwrap_or_default();
        let mut unlock =
            message(&InHeader { opcode: op::SETLK, unique, ..guests }, &asked.message[IN_HEADER..]);
        put_u32_at(&mut unlock, IN_HEADER + LK_TYPE, libc::F_UNLCK as u32);
        self.send(shared, &unlock);
    }

    /// Takes in a request of our own.
    fn own(&self) -> (u64, Receiver<i32>) {
        let (sender, receiver) = sync_channel(1);
        let unique = self.owns.fetch_sub(2, Ordering::Relaxed);
        lock(&self.pending).by_unique.insert(unique, Waiting::Own(sender));
        (unique, receiver)
    }

    /// Answers interrupted requests that the guest does not let go.
    pub(super) fn check_interrupted(&self, shared: &Shared) {
        let mut pending = lock(&self.pending);
        let overdue: Vec<_> = pending.by_unique.extract_if(|_, waiting| waiting.is_overdue()).collect();
        let mut left = Vec::new();
        for (unique, waiting) in overdue {
            let Waiting::Kernel { device, asked, .. } = waiting else { continue };
            pending.late.insert(unique, asked);
            left.push((unique, device));
        }
        let own = pending.by_unique.values().filter(|waiting| matches!(waiting, Waiting::Own(_))).count();
        let broken = pending.late.len().max(own) > MOST_LATE;
        drop(pending);
        left.into_iter().for_each(|(unique, device)| device.answer_errno(unique, libc::EINTR));
        if broken {
            shared.give_up(Lost::Broken("interrupted requests are not answered".to_owned()));
        }
    }
}

impl Waiting {
    fn answer(self, unique: u64, errno: i32) {
        match self {
            Self::Kernel { device, .. } => device.answer_errno(unique, errno),
            // Whoever asked may have stopped waiting.
            Self::Own(sender) => drop(sender.send(errno)),
            Self::Sign(_) => {}
        }
    }

    fn is_overdue(&self) -> bool {
        matches!(self, Self::Kernel { interrupted: Some(since), .. } if since.elapsed() > LET_GO)
    }
}

/// A message of ours whose body is one number.
fn own_message(opcode: u32, unique: u64, body: u64) -> Vec<u8> {
    let mut message = Vec::new();
    let len = (IN_HEADER + 8) as u32;
    InHeader { len, opcode, unique, nodeid: ROOT_ID, ..InHeader::default() }.put(&mut message);
    message.u64(body);
    message
}
