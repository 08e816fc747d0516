//! The event log: exits and OOM kills, numbered from 1 without gaps, kept until the host has them.
//!
//! The host says with each `Events` call up to where it has handled events; those are forgotten. A host
//! that stays connected never says so, so the log is bounded too: the oldest go first, and a call that
//! asks for one of those is told so.

use std::collections::VecDeque;

use tokio::sync::oneshot;
use vmctr_proto::agent::{Event, event};

/// Events kept; a host that reads is never that far behind.
const MAX_KEPT: usize = 4096;

/// Events that the host asks for are gone, or never were.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("events after {after} are asked for; the log holds {first} to {last}")]
pub struct Unavailable {
    after: u64,
    first: u64,
    last: u64,
}

/// Reply to a reader.
type Batch = Result<Vec<Event>, Unavailable>;

/// The log.
#[derive(Default)]
pub struct EventLog {
    /// Number of the last event ever.
    last: u64,
    kept: VecDeque<Event>,
    waiting: Vec<(u64, oneshot::Sender<Batch>)>,
}

impl EventLog {
    /// Appends an event and wakes the readers.
    pub fn push(&mut self, kind: event::Kind) {
        self.last += 1;
        self.kept.push_back(Event { sequence: self.last, kind: Some(kind) });
        if self.kept.len() > MAX_KEPT {
            self.kept.pop_front();
        }
        for (after, reader) in std::mem::take(&mut self.waiting) {
            drop(reader.send(self.since(after)));
        }
    }

    /// Forgets events that the host has handled.
    pub fn acknowledge(&mut self, after: u64) {
        while self.kept.front().is_some_and(|event| event.sequence <= after) {
            self.kept.pop_front();
        }
    }

    /// The events after this one, as soon as there is one.
    pub fn next(&mut self, after: u64) -> oneshot::Receiver<Batch> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.retain(|(_, reader)| !reader.is_closed());
        if after == self.last {
            self.waiting.push((after, sender));
        } else {
            drop(sender.send(self.since(after)));
        }
        receiver
    }

    fn since(&self, after: u64) -> Batch {
        let first = self.last + 1 - self.kept.len() as u64;
        if after > self.last || after + 1 < first {
            return Err(Unavailable { after, first, last: self.last });
        }
        let skip = usize::try_from(after + 1 - first).unwrap_or(usize::MAX);
        Ok(self.kept.iter().skip(skip).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmctr_proto::agent::OomEvent;

    fn oom() -> event::Kind {
        event::Kind::Oom(OomEvent { container_id: "c".to_owned() })
    }

    fn numbers(batch: Batch) -> Vec<u64> {
        batch.unwrap().iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn a_new_connection_gets_what_the_last_one_did_not() {
        let mut log = EventLog::default();
        (0..5).for_each(|_| log.push(oom()));
        assert_eq!(numbers(log.next(2).try_recv().unwrap()), [3, 4, 5]);
        log.acknowledge(3);
        assert_eq!(numbers(log.next(3).try_recv().unwrap()), [4, 5]);
        assert_eq!(log.next(1).try_recv().unwrap(), Err(Unavailable { after: 1, first: 4, last: 5 }));
        assert!(log.next(6).try_recv().unwrap().is_err());
    }

    #[test]
    fn readers_wait_for_the_next_event() {
        let mut log = EventLog::default();
        let mut reader = log.next(0);
        assert!(reader.try_recv().is_err());
        log.push(oom());
        assert_eq!(numbers(reader.try_recv().unwrap()), [1]);
        drop(log.next(1));
        let _reader = log.next(1);
        assert_eq!(log.waiting.len(), 1);
    }

    proptest! {
        #[test]
        fn numbers_have_no_gaps_and_memory_is_bounded(pushes in 0..3 * MAX_KEPT, acknowledged in 0..100_u64) {
            let mut log = EventLog::default();
            (0..pushes).for_each(|_| log.push(oom()));
            log.acknowledge(acknowledged.min(log.last));
            prop_assert!(log.kept.len() <= MAX_KEPT);
            let first = log.last + 1 - log.kept.len() as u64;
            let expected: Vec<_> = (first..=log.last).collect();
            prop_assert_eq!(log.kept.iter().map(|event| event.sequence).collect::<Vec<_>>(), expected);
        }
    }
}
