//! Pairs the streams that the host dials with the processes that wait for them, by number.
//!
//! A stream may come before or after its process asks. Neither side waits for ever, and only a bounded
//! number of streams waits at all.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vmctr_proto::agent::Stdio;

/// Streams and processes that may wait at a time.
const MAX_WAITING: usize = 256;
/// How long a stream waits for its process.
const STREAM_PATIENCE: Duration = Duration::from_secs(60);
/// How long a process waits for its streams.
const PROCESS_PATIENCE: Duration = Duration::from_secs(10);

/// A process's stream did not come.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("stdio stream {0} is asked for twice")]
    Twice(u64),
    #[error("{MAX_WAITING} processes wait for stdio streams already")]
    Full,
    #[error("the host did not open stdio stream {0} within {limit} s", limit = PROCESS_PATIENCE.as_secs())]
    Absent(u64),
}

/// The stream numbers of one process; `None` for no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Whether stdin and stdout are a terminal's, and stderr unused.
    pub terminal: bool,
    /// In the order stdin, stdout, stderr.
    pub streams: [Option<NonZeroU64>; 3],
}

impl From<&Stdio> for Numbers {
    fn from(stdio: &Stdio) -> Self {
        let stderr = if stdio.terminal { 0 } else { stdio.stderr };
        Self { terminal: stdio.terminal, streams: [stdio.stdin, stdio.stdout, stderr].map(NonZeroU64::new) }
    }
}

/// Streams and processes that wait for each other.
#[derive(Default)]
pub struct Streams {
    arrived: HashMap<u64, (OwnedFd, Instant)>,
    awaited: HashMap<u64, oneshot::Sender<OwnedFd>>,
}

/// A process's claim on its streams.
#[derive(Debug)]
pub struct Claim([Option<(u64, oneshot::Receiver<OwnedFd>)>; 3]);

impl Streams {
    /// Takes a stream that the host opened. One too many, or one whose number is taken, is closed.
    pub fn offer(&mut self, number: u64, stream: OwnedFd, now: Instant) {
        self.arrived.retain(|_, (_, since)| now.duration_since(*since) < STREAM_PATIENCE);
        self.awaited.retain(|_, waiting| !waiting.is_closed());
        match self.awaited.remove(&number) {
            // A process that stopped waiting meanwhile lets the stream close.
            Some(waiting) => drop(waiting.send(stream)),
            None if self.arrived.len() < MAX_WAITING => {
                self.arrived.entry(number).or_insert((stream, now));
            }
            None => {}
        }
    }

    /// Claims a process's streams, come or yet to come.
    pub fn claim(&mut self, numbers: &Numbers) -> Result<Claim, Error> {
        self.awaited.retain(|_, waiting| !waiting.is_closed());
        let mut claim = Claim([None, None, None]);
        for (slot, number) in claim.0.iter_mut().zip(numbers.streams) {
            if let Some(number) = number {
                *slot = Some((number.get(), self.claim_one(number.get())?));
            }
        }
        Ok(claim)
    }

    fn claim_one(&mut self, number: u64) -> Result<oneshot::Receiver<OwnedFd>, Error> {
        let (sender, receiver) = oneshot::channel();
        if let Some((stream, _)) = self.arrived.remove(&number) {
            drop(sender.send(stream));
        } else if self.awaited.len() >= MAX_WAITING {
            return Err(Error::Full);
        } else if self.awaited.insert(number, sender).is_some() {
            return Err(Error::Twice(number));
        }
        Ok(receiver)
    }
}

impl Claim {
    /// Waits until all claimed streams are there.
    pub async fn fulfilled(self) -> Result<[Option<OwnedFd>; 3], Error> {
        let deadline = tokio::time::Instant::now() + PROCESS_PATIENCE;
        let mut streams = [None, None, None];
        for (slot, claimed) in streams.iter_mut().zip(self.0) {
            if let Some((number, receiver)) = claimed {
                let stream = tokio::time::timeout_at(deadline, receiver).await;
                *slot = Some(stream.ok().and_then(Result::ok).ok_or(Error::Absent(number))?);
            }
        }
        Ok(streams)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    fn stream() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn numbers(streams: [u64; 3]) -> Numbers {
        Numbers { terminal: false, streams: streams.map(NonZeroU64::new) }
    }

    #[tokio::test(start_paused = true)]
    async fn streams_find_their_process_in_either_order() {
        let mut streams = Streams::default();
        let (early, late) = (stream(), stream());
        let expected = (early.as_raw_fd(), late.as_raw_fd());
        streams.offer(7, early, Instant::now());
        let claim = streams.claim(&numbers([7, 0, 9])).unwrap();
        streams.offer(9, late, Instant::now());
        let [stdin, stdout, stderr] = claim.fulfilled().await.unwrap();
        assert_eq!((stdin.unwrap().as_raw_fd(), stderr.unwrap().as_raw_fd()), expected);
        assert!(stdout.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let mut streams = Streams::default();
        let claim = streams.claim(&numbers([1, 0, 0])).unwrap();
        assert!(matches!(claim.fulfilled().await, Err(Error::Absent(1))));
        // The number is free again: the first claim is gone.
        streams.claim(&numbers([1, 0, 0])).unwrap();

        let start = Instant::now();
        streams.offer(5, stream(), start);
        streams.offer(6, stream(), start + STREAM_PATIENCE);
        assert_eq!(streams.arrived.keys().collect::<Vec<_>>(), [&6]);
    }

    #[test]
    fn a_number_has_one_owner_and_waiting_is_bounded() {
        let mut streams = Streams::default();
        let held = streams.claim(&numbers([1, 0, 0])).unwrap();
        assert!(matches!(streams.claim(&numbers([1, 0, 0])), Err(Error::Twice(1))));
        drop(held);
        for number in 1..=2 * MAX_WAITING as u64 {
            streams.offer(number, stream(), Instant::now());
        }
        assert_eq!(streams.arrived.len(), MAX_WAITING);
    }

    #[test]
    fn a_terminal_has_no_stderr() {
        let stdio = Stdio { terminal: true, stdin: 1, stdout: 2, stderr: 3 };
        assert_eq!(Numbers::from(&stdio).streams, [1, 2, 0].map(NonZeroU64::new));
    }
}
