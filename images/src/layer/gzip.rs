//! gzip on several threads, with bytes that do not depend on how many there are.
//!
//! The input is cut into blocks of a fixed size. Each is deflated on its own, primed with the last
//! 32 KiB before it, and ended on a byte boundary, so that the blocks in order are one deflate stream,
//! one gzip member. Block size and level alone decide the bytes.
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

use flate2::{Compress, Compression, Crc, FlushCompress, Status};

const BLOCK: usize = 512 * 1024;
/// How far back deflate can refer.
const WINDOW: usize = 32 * 1024;
/// Deflate, no flags, no time, no hint, unknown system: nothing of where it was made.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];

struct Job {
    dictionary: Vec<u8>,
    block: Vec<u8>,
    last: bool,
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
    dictionary: Vec<u8>,
    crc: Crc,
}

impl<W: Write> ParallelGzip<W> {
    pub(super) fn new(mut sink: W, level: u32, threads: usize) -> io::Result<Self> {
        sink.write_all(&HEADER)?;
        let (jobs, queue) = sync_channel(threads);
        let queue = Arc::new(Mutex::new(queue));
        let worker = |_| {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new().name("gzip".into()).spawn(move || work(&queue, level))
        };
        Ok(Self {
            sink,
            jobs: Some(jobs),
            workers: (0..threads).map(worker).collect::<Result<_, _>>()?,
            pending: VecDeque::new(),
            most_pending: 2 * threads,
            block: Vec::with_capacity(BLOCK),
            dictionary: Vec::new(),
            crc: Crc::new(),
        })
    }

    /// Writes what is left and the trailer.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.submit(true)?;
        while !self.pending.is_empty() {
            self.take_oldest()?;
        }
        self.jobs = None;
        for worker in self.workers {
            worker.join().map_err(|_| worker_is_gone())?;
        }
        self.sink.write_all(&self.crc.sum().to_le_bytes())?;
        self.sink.write_all(&self.crc.amount().to_le_bytes())?;
        Ok(self.sink)
    }

    fn submit(&mut self, last: bool) -> io::Result<()> {
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(if last { 0 } else { BLOCK }));
        self.crc.update(&block);
        let tail = block[block.len().saturating_sub(WINDOW)..].to_vec();
        let dictionary = std::mem::replace(&mut self.dictionary, tail);
        let (result, receiver) = sync_channel(1);
        let jobs = self.jobs.as_ref().ok_or_else(worker_is_gone)?;
        jobs.send(Job { dictionary, block, last, result }).map_err(|_| worker_is_gone())?;
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
            self.submit(false)?;
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

fn work(queue: &Mutex<Receiver<Job>>, level: u32) {
    let mut deflate = Compress::new(Compression::new(level), false);
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        // Nobody waits any more when the writer was dropped after an error.
        let _ = job.result.send(deflate_block(&mut deflate, &job));
    }
}

fn deflate_block(deflate: &mut Compress, job: &Job) -> io::Result<Vec<u8>> {
    deflate.reset();
    if !job.dictionary.is_empty() {
        deflate.set_dictionary(&job.dictionary).map_err(io::Error::other)?;
    }
    let flush = if job.last { FlushCompress::Finish } else { FlushCompress::Sync };
    let mut out = Vec::with_capacity(job.block.len() / 2 + 1024);
    loop {
        let taken = deflate.total_in() as usize;
        let status = deflate.compress_vec(&job.block[taken..], &mut out, flush).map_err(io::Error::other)?;
        let done = match job.last {
            true => status == Status::StreamEnd,
            false => deflate.total_in() as usize == job.block.len() && out.len() < out.capacity(),
        };
        if done {
            return Ok(out);
        }
        out.reserve(out.capacity());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn sample(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state >> 31 == 0 { b'a' + (state >> 28) as u8 } else { (state >> 20) as u8 }
        };
        (0..length).map(|_| next()).collect()
    }

    fn gzip(bytes: &[u8], threads: usize, step: usize) -> Vec<u8> {
        let mut gzip = ParallelGzip::new(Vec::new(), 6, threads).unwrap();
        bytes.chunks(step).for_each(|chunk| gzip.write_all(chunk).unwrap());
        gzip.finish().unwrap()
    }

    #[test]
    fn one_member_that_others_read_whatever_the_length() {
        for length in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77] {
            let bytes = sample(length);
            let mut read = Vec::new();
            flate2::read::GzDecoder::new(&gzip(&bytes, 2, 1 << 20)[..]).read_to_end(&mut read).unwrap();
            assert!(read == bytes, "{length} bytes");
        }
    }

    #[test]
    fn bytes_depend_neither_on_threads_nor_on_how_input_arrives() {
        let bytes = sample(5 * BLOCK + 4321);
        let first = gzip(&bytes, 1, bytes.len());
        for (threads, step) in [(1, 1000), (2, 4096), (5, 70_000)] {
            assert!(gzip(&bytes, threads, step) == first, "{threads} threads, steps of {step}");
        }
    }

    #[test]
    fn blocks_refer_back_across_their_border() {
        let line = sample(20_000);
        let bytes = line.repeat(2 * BLOCK / line.len());
        assert!(gzip(&bytes, 2, 1 << 20).len() < 40_000);
    }

    #[test]
    fn a_sink_that_fails_is_an_error_and_ends_the_threads() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if bytes == HEADER { Ok(bytes.len()) } else { Err(io::ErrorKind::StorageFull.into()) }
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
