//! gzip on several threads, with bytes that do not depend on how many there are.
//!
//! The input is cut into blocks of a fixed size, and each becomes a gzip member of its own: one after the other
//! they are one gzip file (RFC 1952, 2.2), which every reader of layers reads. Block size and level alone decide the
//! bytes. A block that looks random (data that is compressed already) is stored, which takes no time.
//!
//! ```text
//! write ─> block ─> job queue ─> workers ─> results, taken in the order of the blocks ─> sink
//!                   (bounded)
//! ```

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use libdeflater::{CompressionLvl, Compressor};

/// As large as buildah's: members are small enough for many processors, and lose little by their size.
const BLOCK: usize = 1 << 20;

struct Job {
    block: Vec<u8>,
    result: SyncSender<io::Result<Vec<u8>>>,
}

/// A gzip encoder; [`ParallelGzip::finish`] must be called.
pub(super) struct ParallelGzip<W> {
    sink: W,
    jobs: Option<SyncSender<Job>>,
    workers: Vec<JoinHandle<()>>,
    pending: VecDeque<Receiver<io::Result<Vec<u8>>>>,
    most_pending: usize,
    block: Vec<u8>,
    empty: bool,
}

impl<W: Write> ParallelGzip<W> {
    pub(super) fn new(sink: W, level: u8, threads: usize) -> io::Result<Self> {
        let (jobs, queue) = sync_channel(threads);
        let queue = Arc::new(Mutex::new(queue));
        let worker = |_| {
            let (queue, members) = (Arc::clone(&queue), Members::new(level)?);
            std::thread::Builder::new().name("gzip".into()).spawn(move || work(&queue, members))
        };
        Ok(Self {
            sink,
            workers: (0..threads).map(worker).collect::<Result<_, _>>()?,
            jobs: Some(jobs),
            pending: VecDeque::new(),
            most_pending: 2 * threads,
            block: Vec::new(),
            empty: true,
        })
    }

    /// Writes what is left.
    pub(super) fn finish(mut self) -> io::Result<W> {
        // Nothing at all is one empty member.
        if self.empty || !self.block.is_empty() {
            self.submit()?;
        }
        while !self.pending.is_empty() {
            self.take_oldest()?;
        }
        self.jobs = None;
        for worker in self.workers {
            worker.join().map_err(|_| worker_is_gone())?;
        }
        Ok(self.sink)
    }

    fn submit(&mut self) -> io::Result<()> {
        self.empty = false;
        let block = std::mem::take(&mut self.block);
        let (result, receiver) = sync_channel(1);
        let jobs = self.jobs.as_ref().ok_or_else(worker_is_gone)?;
        jobs.send(Job { block, result }).map_err(|_| worker_is_gone())?;
        self.pending.push_back(receiver);
        while self.pending.len() > self.most_pending {
            self.take_oldest()?;
        }
        Ok(())
    }

    fn take_oldest(&mut self) -> io::Result<()> {
        let Some(oldest) = self.pending.pop_front() else { return Ok(()) };
        self.sink.write_all(&oldest.recv().map_err(|_| worker_is_gone())??)
    }
}

impl<W: Write> Write for ParallelGzip<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..count]);
        if self.block.len() == BLOCK {
            self.submit()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

fn worker_is_gone() -> io::Error {
    io::Error::other("a compression thread ended")
}

fn work(queue: &Mutex<Receiver<Job>>, mut members: Members) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        // Nobody waits any more when the writer was dropped after an error.
        let _ = job.result.send(members.of(&job.block));
    }
}

/// Makes members of blocks.
struct Members {
    wanted: Compressor,
    quick: Compressor,
    stored: Compressor,
}

impl Members {
    fn new(level: u8) -> io::Result<Self> {
        let compressor = |level: u8| {
            let level = CompressionLvl::new(level.into());
            level.map(Compressor::new).map_err(|_| io::Error::other("no level of compression"))
        };
        Ok(Self { wanted: compressor(level)?, quick: compressor(1)?, stored: compressor(0)? })
    }

    fn of(&mut self, block: &[u8]) -> io::Result<Vec<u8>> {
        let random = looks_random(block) && !self.shrinks(block)?;
        member(if random { &mut self.stored } else { &mut self.wanted }, block)
    }

    /// Whether samples of a block contain repetitions.
    fn shrinks(&mut self, block: &[u8]) -> io::Result<bool> {
        const SAMPLE: usize = 64 * 1024;
        const EVERY: usize = BLOCK / 4;
        for part in block.chunks(EVERY) {
            let sample = &part[..part.len().min(SAMPLE)];
            if member(&mut self.quick, sample)?.len() < sample.len() - sample.len() / 128 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn member(compressor: &mut Compressor, block: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = vec![0; compressor.gzip_compress_bound(block.len())];
    let length = compressor.gzip_compress(block, &mut out).map_err(io::Error::other)?;
    out.truncate(length);
    Ok(out)
}

/// Whether all bytes come about equally often, so that no code for single bytes is shorter than they are.
fn looks_random(block: &[u8]) -> bool {
    let mut counts = [0u32; 256];
    block.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    // The mean square of random bytes' counts exceeds the square of the mean by the mean itself.
    let squares: u64 = counts.iter().map(|count| u64::from(*count).pow(2)).sum();
    let length = block.len() as u64;
    let even = length * length / 256;
    squares < even + even / 64 + 2 * length
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn random(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    /// Half letters, half random.
    fn sample(length: usize) -> Vec<u8> {
        random(length).into_iter().map(|byte| if byte < 128 { b'a' + byte / 16 } else { byte }).collect()
    }

    fn gzip(bytes: &[u8], threads: usize, step: usize) -> Vec<u8> {
        let mut gzip = ParallelGzip::new(Vec::new(), 6, threads).unwrap();
        bytes.chunks(step).for_each(|chunk| gzip.write_all(chunk).unwrap());
        gzip.finish().unwrap()
    }

    fn gunzip(bytes: &[u8]) -> Vec<u8> {
        let mut read = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut read).unwrap();
        read
    }

    #[test]
    fn others_read_it_whatever_the_length() {
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77] {
            for bytes in [sample(length), random(length)] {
                assert!(gunzip(&gzip(&bytes, 2, 1 << 20)) == bytes, "{length} bytes");
            }
        }
    }

    #[test]
    fn bytes_depend_neither_on_threads_nor_on_how_input_arrives() {
        let bytes = [sample(2 * BLOCK + 4321), random(2 * BLOCK)].concat();
        let first = gzip(&bytes, 1, bytes.len());
        for (threads, step) in [(1, 1000), (2, 4096), (5, 70_000)] {
            assert!(gzip(&bytes, threads, step) == first, "{threads} threads, steps of {step}");
        }
    }

    #[test]
    fn random_bytes_are_stored_and_grow_by_next_to_nothing() {
        let bytes = random(2 * BLOCK);
        assert!(looks_random(&bytes[..BLOCK]) && !Members::new(6).unwrap().shrinks(&bytes[..BLOCK]).unwrap());
        let stored = gzip(&bytes, 2, 1 << 20);
        assert!((bytes.len()..bytes.len() + bytes.len() / 5000).contains(&stored.len()), "{}", stored.len());
    }

    #[test]
    fn repetitions_of_random_bytes_are_compressed() {
        let bytes = random(20_000).repeat(2 * BLOCK / 20_000);
        assert!(looks_random(&bytes[..BLOCK]));
        assert!(gzip(&bytes, 2, 1 << 20).len() < bytes.len() / 20);
    }

    #[test]
    fn text_is_no_random() {
        assert!(!looks_random(&sample(BLOCK)));
        assert!(!looks_random(&[7; 1000]));
    }

    #[test]
    fn a_sink_that_fails_is_an_error_and_ends_the_threads() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut gzip = ParallelGzip::new(Full, 6, 2).unwrap();
        let bytes = sample(20 * BLOCK);
        assert_eq!(gzip.write_all(&bytes).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
