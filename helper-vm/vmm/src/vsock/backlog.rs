//! Bytes from the guest that the host's reader has not taken yet: a byte queue in one allocation.
//!
//! ```text
//!   bytes  │ taken │ waiting ······ │
//!          0       start            len      push appends, write_to takes from `start`
//! ```
//!
//! Credit bounds `waiting` by [`super::credit::BUFFER`]; the taken part never outgrows the waiting part, so
//! the allocation stays within twice that. An empty backlog of a connection that once had a slow reader
//! gives its memory back.

use std::io::{self, Write};

use vm_memory::VolatileSlice;

/// What an empty backlog may keep allocated.
const KEEP: usize = 16 * 1024;

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Appends a copy of guest memory.
    pub(super) fn push(&mut self, data: &VolatileSlice<'_>) {
        self.compact();
        let end = self.bytes.len();
        self.bytes.resize(end + data.len(), 0);
        data.copy_to(&mut self.bytes[end..]);
    }

    /// One write of everything that waits; what the writer took is gone from the queue.
    pub(super) fn write_to(&mut self, mut writer: impl Write) -> io::Result<usize> {
        let written = writer.write(&self.bytes[self.start..])?;
        self.start += written;
        if self.is_empty() {
            self.clear();
        }
        Ok(written)
    }

    /// Drops everything and says how much that was.
    pub(super) fn clear(&mut self) -> usize {
        let dropped = self.len();
        self.start = 0;
        self.bytes.clear();
        self.bytes.shrink_to(KEEP);
        dropped
    }

    fn compact(&mut self) {
        if self.start > self.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Takes `room` bytes per write.
    struct Narrow<'a> {
        room: usize,
        out: &'a mut Vec<u8>,
    }

    impl Write for Narrow<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.room);
            self.out.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn bytes_leave_in_the_order_in_which_they_came(
            steps in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..200), 0_usize..300), 0..50)
        ) {
            let (mut backlog, mut model, mut most) = (Backlog::default(), VecDeque::new(), 0);
            for (mut pushed, room) in steps {
                model.extend(pushed.iter().copied());
                backlog.push(&VolatileSlice::from(&mut pushed[..]));
                most = most.max(backlog.len());
                let mut out = Vec::new();
                let n = backlog.write_to(Narrow { room, out: &mut out }).unwrap();
                prop_assert_eq!(out, model.drain(..n).collect::<Vec<_>>());
                prop_assert_eq!(backlog.len(), model.len());
                prop_assert!(backlog.bytes.len() <= 2 * most);
            }
        }
    }

    #[test]
    fn an_emptied_backlog_gives_its_memory_back() {
        let mut backlog = Backlog::default();
        backlog.push(&VolatileSlice::from(&mut vec![7; 200_000][..]));
        assert_eq!(backlog.clear(), 200_000);
        assert!(backlog.is_empty());
        assert!(backlog.bytes.capacity() <= 2 * KEEP);
    }
}
