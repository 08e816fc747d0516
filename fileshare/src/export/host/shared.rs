//! What the relay's threads share.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::attrs::{Attrs, Moment};
use super::check::Remember;
use super::config::{Cache, Config};
use super::evict::Told;
use super::export::Streams;
use super::known::Known;
use super::lazy::Lazies;
use super::listings::Listings;
use super::question::{names_taken, u32_at, u64_at};
use super::served::{Served, is_own};
use super::shortcut::Shortcut;
use super::through::Through;
use super::upper::Upper;
use super::waits::Waits;
use crate::export::wire::abi::{IN_HEADER, InHeader, flag, node_places, op};
use crate::export::wire::stream::Stream;

/// How many (file, owner) pairs are known to have had locks. With more, every close is told to the guest.
const MOST_LOCKED: usize = 1 << 16;

/// How much longer than a silent guest one may work on a request that gives signs of life: an hour of it.
const ENDLESS: u32 = 30;

/// One mount's state.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) remember: Remember,
    pub(super) flags: OpenFlags,
    pub(super) most_entries: u64,
    pub(super) patience: Duration,
    pub(super) lazies: Lazies,
    pub(super) listings: Listings,
    /// Only where nobody else changes files.
    pub(super) attrs: Option<Attrs>,
    /// The same.
    pub(super) known: Option<Known>,
    pub(super) turns: Turns,
    pub(super) told: Told,
    pub(super) shortcut: Shortcut,
    pub(super) served: Served,
    pub(super) upper: Upper,
    /// Only where nobody changes files at all.
    pub(super) through: Option<Through>,
    pub(super) waits: Waits,
    pub(super) complaints: Complaints,
    pub(super) lanes: Vec<Turn>,
    locked: Mutex<Locked>,
    changes: AtomicU64,
    lost: AtomicBool,
    why: Mutex<Option<Lost>>,
    started: Instant,
}

/// What the kernel is told about files and folders that it opens.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenFlags {
    pub(super) file: u32,
    pub(super) folder: u32,
}

/// One lane: its stream, and what it is doing.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) stream: Stream,
    since: AtomicU64,
}

#[derive(Debug, Default)]
struct Locked {
    pairs: HashSet<(u64, u64)>,
    overflow: bool,
}

/// Why the guest is given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The VM or its server ended.
    #[error("The guest closed the export")]
    Closed,
    /// It takes too long.
    #[error("The guest did not answer a request within {0:?}")]
    Silent(Duration),
    /// What it sends is no protocol.
    #[error("The guest broke the export's protocol: {0}")]
    Broken(String),
}

impl Turn {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, since: AtomicU64::new(0) }
    }
}

impl Shared {
    pub(super) fn new(
        config: &Config,
        flags: OpenFlags,
        (shortcut, served, upper): (Shortcut, Served, Upper),
        streams: Streams,
    ) -> Self {
        Self {
            remember: Remember::new(config),
            flags,
            most_entries: config.most_entries,
            patience: config.patience,
            lazies: Lazies::default(),
            listings: Listings::default(),
            attrs: (config.cache == Cache::Alone).then(Attrs::default),
            known: (config.cache == Cache::Alone).then(Known::default),
            turns: Turns::default(),
            told: Told::new(config.most_nodes),
            shortcut,
            served,
            upper,
            through: None,
            waits: Waits::new(streams.waits),
            complaints: Complaints::default(),
            lanes: streams.turns.into_iter().map(Turn::new).collect(),
            locked: Mutex::default(),
            changes: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            why: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// A lane begins to wait for the guest.
    pub(super) fn begin(&self, lane: usize) {
        self.lanes[lane].since.store(self.now(), Ordering::Relaxed);
    }

    /// A lane's turn is over.
    pub(super) fn end(&self, lane: usize) {
        self.lanes[lane].since.store(0, Ordering::Relaxed);
    }

    /// Gives the guest up if a lane has waited for too long, and there was no sign of life either, or for much too
    /// long: a large file's copy-up takes its time.
    pub(super) fn check_patience(&self) {
        let waited = self.waited();
        let half = self.patience / 2;
        if waited < half {
            return;
        }
        let dead = self.waits.ask_for_sign(self) > half && waited > self.patience;
        if dead || waited > self.patience * ENDLESS {
            self.give_up(Lost::Silent(waited));
        }
    }

    /// How long the lane has waited that waits for longest.
    fn waited(&self) -> Duration {
        let now = self.now();
        let waited = self.lanes.iter().map(|lane| match lane.since.load(Ordering::Relaxed) {
            0 => 0,
            since => now.saturating_sub(since),
        });
        Duration::from_millis(waited.max().unwrap_or(0))
    }

    /// Milliseconds, never 0.
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64 + 1
    }

    /// Ends all talk with the guest: what waits for it returns, and all else is answered EIO from now on.
    pub(super) fn give_up(&self, why: Lost) {
        let mut reason = lock(&self.why);
        if reason.is_none() {
            *reason = Some(why);
        }
        drop(reason);
        if !self.lost.swap(true, Ordering::AcqRel) {
            self.lanes.iter().for_each(|lane| lane.stream.shutdown());
            self.waits.shutdown();
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn why(&self) -> Option<Lost> {
        lock(&self.why).clone()
    }

    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Keeps which names a folder has; `changes` is from before the guest was asked.
    pub(super) fn keep_names<'a>(&self, folder: u64, names: impl Iterator<Item = &'a [u8]>, changes: u64) {
        if let Some(known) = &self.known {
            known.listed(folder, names, (changes, &self.changes));
        }
    }

    /// A request that changes something is about to be sent, or was just answered. What was listed before is old
    /// then, and more.
    pub(super) fn note(&self, header: &InHeader, body: &[u8]) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.note_names(header, body);
        self.note_served(header, body);
        self.shortcut.note(header.opcode, header.nodeid, body);
        if let Some(attrs) = &self.attrs {
            attrs.note(header.opcode, header.nodeid, body);
        }
        if let Some(known) = &self.known {
            known.about_to(header.opcode, header.nodeid, body);
        }
    }

    fn note_names(&self, header: &InHeader, body: &[u8]) {
        for (folder, _) in names_taken(header, body).into_iter().flatten() {
            self.listings.note(folder);
        }
    }

    fn note_served(&self, header: &InHeader, body: &[u8]) {
        if !self.served.serves() {
            return;
        }
        for place in node_places(header.opcode) {
            // Of the request's own node the header tells; the other is in the body.
            let other = place.checked_sub(IN_HEADER).map(|at| u64_at(body, at));
            self.served.change(other.unwrap_or(header.nodeid));
        }
        for (folder, name) in names_taken(header, body).into_iter().flatten() {
            self.served.change_name(folder, name);
        }
    }

    /// Now, as attributes will be kept from.
    pub(super) fn moment(&self) -> Option<Moment> {
        self.attrs.as_ref().map(Attrs::moment)
    }

    /// Keeps a node's attributes; the moment is from before the guest was asked.
    pub(super) fn keep_attr(&self, nodeid: u64, attr: &[u8], then: Option<Moment>) {
        if let Some((attrs, then)) = self.attrs.as_ref().zip(then).filter(|_| nodeid != 0) {
            attrs.keep(nodeid, attr, then, Instant::now());
        }
    }

    /// The answer to GETATTR, if it is known.
    pub(super) fn known_attr(&self, nodeid: u64) -> Option<Vec<u8>> {
        let attr = self.attrs.as_ref()?.get(nodeid, Instant::now())?;
        Some(self.remember.attr_out(&attr))
    }

    /// Whether a file that is opened to write may be parted from other names by its copy-up: then it has fewer, which
    /// the kernel does not see. Those that the host serves have one.
    pub(super) fn may_part(&self, nodeid: u64) -> bool {
        !is_own(nodeid) && self.attrs.as_ref().is_some_and(|attrs| !attrs.has_one_name(nodeid))
    }

    /// If a request is for an fcntl lock, remembers that closing the file has to be told to the guest. To be noted
    /// when it is asked for and when it is granted: another thread's close in between is not this one's.
    pub(super) fn note_lock(&self, header: &InHeader, message: &[u8]) {
        let body = &message[IN_HEADER..];
        let locks = matches!(header.opcode, op::SETLK | op::SETLKW | op::GETLK);
        if !locks || u32_at(body, 40) & flag::LK_FLOCK != 0 {
            return;
        }
        let (node, owner) = (header.nodeid, u64_at(body, 8));
        let mut locked = lock(&self.locked);
        if locked.pairs.len() < MOST_LOCKED {
            locked.pairs.insert((node, owner));
        } else {
            locked.overflow = true;
        }
    }

    /// Whether a close has to be told.
    pub(super) fn forget_lock(&self, node: u64, owner: u64) -> bool {
        let mut locked = lock(&self.locked);
        locked.pairs.remove(&(node, owner)) || locked.overflow
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is wrong with the guest's answers, in the log, but not all day.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<Complained>);

#[derive(Debug, Default)]
struct Complained {
    period: Option<(Instant, u32)>,
    in_all: u32,
}

impl Complaints {
    const PERIOD: Duration = Duration::from_secs(10);
    const MOST: u32 = 10;
    /// The log lies in memory where /run does.
    const MOST_IN_ALL: u32 = 5000;

    /// Whether one more may be logged.
    pub(super) fn may(&self) -> bool {
        self.may_at(Instant::now())
    }

    fn may_at(&self, now: Instant) -> bool {
        let mut so_far = lock(&self.0);
        let (since, count) = match so_far.period {
            Some((since, count)) if now.duration_since(since) < Self::PERIOD => (since, count + 1),
            _ => (now, 1),
        };
        so_far.period = Some((since, count));
        if count > Self::MOST || so_far.in_all >= Self::MOST_IN_ALL {
            return false;
        }
        so_far.in_all += 1;
        if so_far.in_all == Self::MOST_IN_ALL {
            tracing::warn!("so much is wrong with the guest's answers that no more is told after this");
        }
        true
    }
}

/// How often the guest was asked what.
#[derive(Debug)]
pub(super) struct Turns([AtomicU64; Self::KINDS]);

impl Default for Turns {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; Self::KINDS])
    }
}

impl Turns {
    const KINDS: usize = 64;

    pub(super) fn count(&self, opcode: u32) {
        self.0[Self::place(opcode)].fetch_add(1, Ordering::Relaxed);
    }

    /// Ours come after the kernel's, whose numbers are below 60.
    fn place(opcode: u32) -> usize {
        match opcode {
            op::OPEN_READ => 60,
            op::OPENDIR_READ => 61,
            op::FIND => 62,
            other => (other as usize).min(Self::KINDS - 1),
        }
    }

    pub(super) fn of(&self, opcode: u32) -> u64 {
        self.0[Self::place(opcode)].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_few_at_a_time_and_have_an_end() {
        let complaints = Complaints::default();
        let mut now = Instant::now();
        assert_eq!((0..1000).filter(|_| complaints.may_at(now)).count(), Complaints::MOST as usize);
        let days = (0..100_000).filter(|_| {
            now += Duration::from_secs(2);
            complaints.may_at(now)
        });
        assert_eq!(days.count(), (Complaints::MOST_IN_ALL - Complaints::MOST) as usize);
    }
}
