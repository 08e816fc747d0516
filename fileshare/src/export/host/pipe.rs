//! Hands bytes of a host's file to the kernel without copying them here first.
//!
//! ```text
//!   header ── write ──┐
//!   file ── splice ───┴─> pipe ── splice ──> /dev/fuse
//! ```
//!
//! Invariant: between two answers the pipe is empty; one that may not be is thrown away.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::device::Device;
use crate::export::wire::abi::{OUT_HEADER, OutHeader};

/// What a pipe can hold that anybody may have (pipe(7)).
const SIZE: usize = 1 << 20;

/// The most that the kernel asks for at once. A pipe counts pages, of which the header takes one, and the bytes one
/// more than they fill.
pub(super) const MAX_READ: usize = SIZE / 2;

/// Below, one copy costs less than two more system calls.
pub(super) const WORTH_IT: usize = 64 * 1024;

/// A pipe that holds one answer, made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Pipe(Option<(OwnedFd, OwnedFd)>);

impl Pipe {
    /// Answers with the `length` bytes of `file` at `offset`; `false` if the kernel has taken no answer, as when
    /// they are not there.
    pub(super) fn answer(
        &mut self,
        device: &Device,
        unique: u64,
        file: &OwnedFd,
        (offset, length): (u64, usize),
    ) -> bool {
        let filled = self.fill(unique, file, (offset, length));
        let Ok((reads, whole)) = filled else {
            self.0 = None;
            return false;
        };
        let taken = device.splice(reads, whole) == Ok(whole);
        if !taken {
            self.0 = None;
        }
        taken
    }

    fn fill(
        &mut self,
        unique: u64,
        file: &OwnedFd,
        (mut offset, length): (u64, usize),
    ) -> io::Result<(&OwnedFd, usize)> {
        let (reads, writes) = match &mut self.0 {
            Some(ends) => ends,
            none => none.insert(open()?),
        };
        let whole = OUT_HEADER + length;
        let mut header = Vec::with_capacity(OUT_HEADER);
        OutHeader { len: whole as u32, error: 0, unique }.put(&mut header);
        rustix::io::write(&*writes, &header)?;
        let mut left = length;
        while left > 0 {
            match splice(file, Some(&mut offset), &*writes, None, left, SpliceFlags::NONBLOCK) {
                Ok(0) => return Err(io::Error::other("the file has become shorter")),
                Ok(moved) => left -= moved,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok((reads, whole))
    }
}

fn open() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reads, writes) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setpipe_size(&writes, SIZE)?;
    Ok((reads, writes))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    fn file(length: usize) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        file.write_all(&bytes).unwrap();
        file.into()
    }

    #[test]
    fn an_answer_is_the_header_and_the_file_s_bytes() {
        let (file, mut pipe) = (file(2 << 20), Pipe::default());
        for (offset, length) in [(0, MAX_READ), (4095, MAX_READ), (77, WORTH_IT), ((2 << 20) - 5, 5)] {
            let (reads, whole) = pipe.fill(9, &file, (offset, length)).unwrap();
            let mut answer = vec![0; whole];
            File::from(reads.try_clone().unwrap()).read_exact(&mut answer).unwrap();
            let mut header = Vec::new();
            OutHeader { len: whole as u32, error: 0, unique: 9 }.put(&mut header);
            assert_eq!(answer[..OUT_HEADER], header);
            let right =
                (offset as usize..).zip(&answer[OUT_HEADER..]).all(|(at, byte)| (at % 251) as u8 == *byte);
            assert!(right && answer.len() == OUT_HEADER + length, "{offset} {length}");
        }
    }

    #[test]
    fn a_file_that_is_too_short_is_no_answer_and_leaves_no_bytes_behind() {
        let (file, mut pipe) = (file(WORTH_IT), Pipe::default());
        let device = Device(File::options().write(true).open("/dev/null").unwrap().into());
        assert!(!pipe.answer(&device, 1, &file, (10, WORTH_IT)));
        let (reads, whole) = pipe.fill(2, &file, (0, 3)).unwrap();
        let mut answer = vec![0; whole];
        File::from(reads.try_clone().unwrap()).read_exact(&mut answer).unwrap();
        assert_eq!(answer[OUT_HEADER..], [0, 1, 2]);
    }
}
