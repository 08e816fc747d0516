//! A writer that is hashed on a thread of its own, so that hashing and writing keep another processor busy.
//!
//! ```text
//! write ─> buffer ─ full ─> queue (bounded) ─> thread: sha256, sink
//!             ^──────────── used buffers ────────┘
//! ```
//!
//! Invariant: the thread has ended when the writer is gone, whether it was finished or dropped.

use std::io::{self, Write};
use std::mem;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

use crate::digest::{Digest, HashingWriter};

const BUFFER: usize = 256 * 1024;
/// Buffers on their way.
const QUEUE: usize = 4;

type Hashed<W> = HashingWriter<W>;

/// The near end.
pub(crate) struct Behind<W: Write> {
    buffer: Vec<u8>,
    full: Option<SyncSender<Vec<u8>>>,
    used: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<io::Result<Hashed<W>>>>,
}

impl<W: Write + Send + 'static> Behind<W> {
    /// Hashes and writes all that comes to `sink`.
    pub(crate) fn new(sink: W) -> io::Result<Self> {
        let (full, queue) = sync_channel::<Vec<u8>>(QUEUE);
        let (give_back, used) = channel();
        let work = move || {
            let mut sink = HashingWriter::new(sink);
            for buffer in queue {
                sink.write_all(&buffer)?;
                // Nobody needs it any more once the near end is finished.
                let _ = give_back.send(buffer);
            }
            sink.flush()?;
            Ok(sink)
        };
        let thread = Some(Builder::new().name("hash".into()).spawn(work)?);
        Ok(Self { buffer: Vec::with_capacity(BUFFER), full: Some(full), used, thread })
    }
}

impl<W: Write> Behind<W> {
    /// Waits until all is written; tells digest and length.
    pub(crate) fn finish(mut self) -> io::Result<(W, Digest, u64)> {
        self.flush()?;
        Ok(self.end()?.finish())
    }

    /// The thread ends once it has no more to expect.
    fn end(&mut self) -> io::Result<Hashed<W>> {
        self.full = None;
        let gone = || io::Error::other("the thread that writes ended");
        self.thread.take().ok_or_else(gone)?.join().map_err(|_| gone())?
    }
}

impl<W: Write> Write for Behind<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(BUFFER - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == BUFFER {
            self.flush()?;
        }
        Ok(count)
    }

    /// Hands over what is there.
    fn flush(&mut self) -> io::Result<()> {
        let mut next = self.used.try_recv().unwrap_or_else(|_| Vec::with_capacity(BUFFER));
        next.clear();
        let buffer = mem::replace(&mut self.buffer, next);
        let sent = self.full.as_ref().map(|full| full.send(buffer));
        match sent {
            Some(Ok(())) => Ok(()),
            // The thread ended before its time: its error says why.
            _ => self.end().and(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }
}

impl<W: Write> Drop for Behind<W> {
    fn drop(&mut self) {
        // Whoever drops it unfinished has an error of his own to report.
        let _ = self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn all_bytes_arrive_in_order_and_are_hashed() {
        let bytes: Vec<u8> = (0..3 * BUFFER as u32 + 77).map(|i| (i / 7) as u8).collect();
        let mut behind = Behind::new(Vec::new()).unwrap();
        bytes.chunks(1000).for_each(|chunk| behind.write_all(chunk).unwrap());
        let (written, digest, count) = behind.finish().unwrap();
        assert!(written == bytes);
        assert_eq!((digest, count), (Digest::of(&bytes), bytes.len() as u64));
    }

    struct Full {
        _held: Arc<()>,
    }

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_sinks_error_is_the_writers() {
        let mut behind = Behind::new(Full { _held: Arc::default() }).unwrap();
        let error = (0..20).find_map(|_| behind.write_all(&[0; BUFFER]).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let finished = Behind::new(Full { _held: Arc::default() }).unwrap().after(b"x").finish();
        assert_eq!(finished.err().unwrap().kind(), io::ErrorKind::StorageFull);
    }

    impl<W: Write> Behind<W> {
        fn after(mut self, bytes: &[u8]) -> Self {
            self.write_all(bytes).unwrap();
            self
        }
    }

    #[test]
    fn a_dropped_writer_leaves_no_thread_with_the_sink() {
        let held = Arc::new(());
        drop(Behind::new(Full { _held: Arc::clone(&held) }).unwrap().after(b"x"));
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
