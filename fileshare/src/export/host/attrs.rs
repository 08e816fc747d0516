//! Attributes as the guest last told them, for the kernel's asking again.
//!
//! The kernel takes a file's attributes for old once it has read the file, for the time of access may have
//! changed, and asks at the next stat(2): that would be a turn for each file and folder of a tree that is read
//! twice. Times of access are given from here, up to [`OLDEST`] late; anything else that changes makes all of it
//! void.
//!
//! Invariant: what is given was true when last the file changed, or any name did: removing a name changes the
//! file that had it, and which that is only the guest knows.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::question::u64_at;
use super::shared::lock;
use crate::export::wire::abi::{ATTR, Attr, op};
use crate::export::wire::codec::Take;

/// How late a time of access may be.
const OLDEST: Duration = Duration::from_secs(60);

/// How many are kept.
const MOST: usize = 1 << 16;

#[derive(Debug, Default)]
pub(super) struct Attrs {
    known: Mutex<HashMap<u64, Known>>,
    clock: Clock,
    /// Counts changes of names.
    names: AtomicU64,
}

/// A moment, from before the guest was asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    time: u64,
    names: u64,
}

impl Moment {
    /// After one more change of names, and no other.
    pub(super) fn after_change(self) -> Self {
        Self { names: self.names + 1, ..self }
    }
}

#[derive(Debug)]
struct Known {
    attr: [u8; ATTR],
    then: Moment,
    at: Instant,
}

impl Attrs {
    pub(super) fn moment(&self) -> Moment {
        Moment { time: self.clock.now(), names: self.names.load(Ordering::Acquire) }
    }

    /// A request is about to be sent that changes something, or was just answered.
    pub(super) fn note(&self, opcode: u32, nodeid: u64, body: &[u8]) {
        match opcode {
            op::OPEN | op::WRITE | op::SETATTR | op::FALLOCATE | op::SETXATTR | op::REMOVEXATTR => {
                self.clock.note(nodeid);
            }
            op::COPY_FILE_RANGE => self.clock.note(u64_at(body, 16)),
            _ => {
                self.names.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// Keeps what the guest told.
    pub(super) fn keep(&self, nodeid: u64, attr: &[u8], then: Moment, now: Instant) {
        let Ok(attr) = attr.try_into() else { return };
        let mut known = lock(&self.known);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(nodeid, Known { attr, then, at: now });
    }

    /// Whether a file is known to have had one name only.
    pub(super) fn has_one_name(&self, nodeid: u64) -> bool {
        let attr = lock(&self.known).get(&nodeid).map(|one| one.attr);
        attr.is_some_and(|attr| Attr::take(&mut Take::new(&attr)).is_ok_and(|attr| attr.nlink == 1))
    }

    /// What is known, if nothing changed since.
    pub(super) fn get(&self, nodeid: u64, now: Instant) -> Option<[u8; ATTR]> {
        let known = lock(&self.known);
        let one = known.get(&nodeid)?;
        let same = one.then.names == self.names.load(Ordering::Acquire)
            && !self.clock.is_changed(nodeid, one.then.time);
        (same && now.duration_since(one.at) < OLDEST).then_some(one.attr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_still_true_is_given() {
        let (attrs, now) = (Attrs::default(), Instant::now());
        let keep = || (7..9).for_each(|node| attrs.keep(node, &[1; ATTR], attrs.moment(), now));
        keep();
        assert_eq!(attrs.get(7, now), Some([1; ATTR]));
        assert_eq!(attrs.get(7, now + OLDEST), None, "the time of access may be another");
        assert_eq!(attrs.get(9, now), None);
        attrs.note(op::WRITE, 7, &[]);
        assert_eq!(attrs.get(7, now), None);
        assert_eq!(attrs.get(8, now), Some([1; ATTR]), "another file was written to");
        keep();
        attrs.note(op::UNLINK, 1, &[]);
        assert_eq!(attrs.get(7, now), None, "it may have lost a name");
        let before = attrs.moment();
        attrs.note(op::CREATE, 1, &[]);
        attrs.keep(1, &[2; ATTR], before.after_change(), now);
        assert_eq!(attrs.get(1, now), Some([2; ATTR]), "told with the change itself");
    }

    #[test]
    fn they_are_bounded() {
        let (attrs, now) = (Attrs::default(), Instant::now());
        (0..=MOST as u64).for_each(|nodeid| attrs.keep(nodeid, &[0; ATTR], attrs.moment(), now));
        assert!(lock(&attrs.known).len() <= MOST);
    }
}
