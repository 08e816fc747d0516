//! Attributes as the guest last told them, for the kernel's asking again.
//!
//! The kernel takes a file's attributes for old once it has read the file, for the time of access may have
//! changed, and asks at the next stat(2): that would be a turn for each file and folder of a tree that is read
//! twice. Times of access are given from here, up to [`OLDEST`] late; anything else that changes makes all of it
//! void.
//!
//! Invariant: what is given was true when last anything changed ([`super::shared::Shared::changes`]).

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::shared::lock;
use crate::export::wire::abi::ATTR;

/// How late a time of access may be.
const OLDEST: Duration = Duration::from_secs(60);

/// How many are kept.
const MOST: usize = 1 << 16;

#[derive(Debug, Default)]
pub(super) struct Attrs(Mutex<HashMap<u64, Known>>);

#[derive(Debug)]
struct Known {
    attr: [u8; ATTR],
    changes: u64,
    at: Instant,
}

impl Attrs {
    /// Keeps what the guest told; `changes` is from before it was asked.
    pub(super) fn keep(&self, nodeid: u64, attr: &[u8], changes: u64, now: Instant) {
        let Ok(attr) = attr.try_into() else { return };
        let mut known = lock(&self.0);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(nodeid, Known { attr, changes, at: now });
    }

    /// What is known, if nothing changed since.
    pub(super) fn get(&self, nodeid: u64, changes: u64, now: Instant) -> Option<[u8; ATTR]> {
        let known = lock(&self.0);
        let one = known.get(&nodeid)?;
        (one.changes == changes && now.duration_since(one.at) < OLDEST).then_some(one.attr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_still_true_is_given() {
        let (attrs, now) = (Attrs::default(), Instant::now());
        attrs.keep(7, &[1; ATTR], 3, now);
        assert_eq!(attrs.get(7, 3, now), Some([1; ATTR]));
        assert_eq!(attrs.get(7, 4, now), None, "something changed");
        assert_eq!(attrs.get(7, 3, now + OLDEST), None, "the time of access may be another");
        assert_eq!(attrs.get(8, 3, now), None);
    }

    #[test]
    fn they_are_bounded() {
        let (attrs, now) = (Attrs::default(), Instant::now());
        (0..=MOST as u64).for_each(|nodeid| attrs.keep(nodeid, &[0; ATTR], 0, now));
        assert!(lock(&attrs.0).len() <= MOST);
    }
}
