//! Reading, writing and copying what files hold, by one rule on both sides, so that it is all the same which of them
//! does it.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::{Errno, ReadWriteFlags, Result};

use super::wire::abi::MAX_DATA;

/// Reads until `into` is full or the file ends; tells how much there was.
pub(super) fn read_at(file: impl AsFd, into: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while done < into.len() {
        let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
        match rustix::io::pread(&file, &mut into[done..], at)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// Writes all of `data`, or as much as there is room for.
pub(super) fn write_at(file: impl AsFd, data: &[u8], offset: u64, how: ReadWriteFlags) -> Result<u32> {
    let mut done = 0;
    while done < data.len() {
        let at = offset.checked_add(done as u64).ok_or(Errno::FBIG)?;
        match write_once(file.as_fd(), &data[done..], at, how) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(done as u32)
}

fn write_once(file: BorrowedFd<'_>, data: &[u8], at: u64, how: ReadWriteFlags) -> Result<usize> {
    if how.is_empty() {
        rustix::io::pwrite(file, data, at)
    } else {
        rustix::io::pwritev2(file, &[IoSlice::new(data)], at, how)
    }
}

/// How much of a copy is done at once: the answer has 32 bits, and one request should not hold a thread for minutes.
pub(super) fn copy_length(length: u64) -> usize {
    length.min(u64::from(MAX_DATA) * 64) as usize
}
