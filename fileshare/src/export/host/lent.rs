//! Requests about what files of the upper folder hold, answered from the files themselves.
//!
//! ```text
//!   READ, WRITE, FSYNC, FALLOCATE, LSEEK, GETATTR, COPY_FILE_RANGE ──> the host's file ──> kernel
//!   all else, and files that are not lent                          ──> guest
//! ```
//!
//! Invariant: what changes a file here is noted as if the guest had been asked, so that nothing that is kept outlives
//! the change.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::ReadWriteFlags;

use super::lane::Lane;
use super::question::{changes, put_u64_at, u32_at, u64_at};
use super::reading::lower_file;
use super::shared::lock;
use super::shortcut::HostFile;
use super::talk::{Errno, message};
use super::upper::UpperFile;
use crate::export::bytes::{copy_length, read_at, write_at};
use crate::export::privileges::{self, Unprivileged};
use crate::export::wire::abi::{IN_HEADER, InHeader, MAX_DATA, flag, op};
use crate::export::wire::codec::Put;

/// Length of `fuse_write_in`.
const WRITE_IN: usize = 40;

/// What is read from: an upper file, or a lower one.
enum Source {
    Upper(Arc<UpperFile>),
    Lower(Arc<HostFile>),
}

impl Lane {
    /// Answers a request about a file that is lent; `false` if the guest has to.
    pub(super) fn answer_lent(&mut self, header: &InHeader, request: &[u8]) -> bool {
        let shared = self.shared();
        if !is_of_contents(header.opcode) || shared.is_lost() {
            return false;
        }
        let body = &request[IN_HEADER..];
        let done = match header.opcode {
            op::GETATTR => return self.attributes_lent(header),
            op::COPY_FILE_RANGE => {
                let to = shared.upper.find(u64_at(body, 16));
                let Some(to) = to else { return false };
                let Some(from) = self.source(header, u64_at(body, 0)) else { return false };
                match from {
                    Source::Upper(from) => self.changing(header, body, || copy(&from, &to, header, body)),
                    Source::Lower(from) => match shared.shortcut.unchanged(&from) {
                        Some(from) => self.changing(header, body, || copy(from, &to, header, body)),
                        None => return false,
                    },
                }
            }
            _ => {
                let Some(file) = self.upper_file(header.nodeid, u64_at(body, 0)) else { return false };
                match header.opcode {
                    op::READ => self.read_lent(header, request, &file).map(|()| None),
                    op::WRITE => {
                        shared.upper.count_write();
                        self.changing(header, body, || write(&file, header, body))
                    }
                    op::FALLOCATE => self.changing(header, body, || allocate(&file, header, body)),
                    op::FSYNC => {
                        let (handle, done) = (u64_at(body, 0), sync(&file, body));
                        shared.upper.synced(header.nodeid, handle, done, libc::EIO).map(|()| Some(Vec::new()))
                    }
                    _ => seek(&file, body),
                }
            }
        };
        match done {
            Ok(Some(answer)) => self.device.answer_body(header.unique, &answer),
            Ok(None) => {}
            Err(errno) => self.device.answer_errno(header.unique, errno),
        }
        true
    }

    /// Does what changes a file, as the guest would have been asked to.
    fn changing<T>(&self, header: &InHeader, body: &[u8], change: impl FnOnce() -> T) -> T {
        let shared = self.shared();
        debug_assert!(changes(header.opcode, body));
        shared.note(header, body);
        let done = change();
        shared.note(header, body);
        done
    }

    /// The upper file behind a node, or behind one of our handles.
    fn upper_file(&self, nodeid: u64, handle: u64) -> Option<Arc<UpperFile>> {
        let shared = &self.talk.shared;
        shared.upper.find(nodeid).or_else(|| lock(&shared.lazies.find(handle)?.state).upper.clone())
    }

    /// What a copy reads from, if it is at hand.
    fn source(&mut self, header: &InHeader, handle: u64) -> Option<Source> {
        if let Some(upper) = self.upper_file(header.nodeid, handle) {
            return Some(Source::Upper(upper));
        }
        let shared = self.shared();
        let lazy = shared.lazies.find(handle)?;
        let mut state = lock(&lazy.state);
        if lower_file(&shared, header.nodeid, &mut state).is_none() && state.guest.is_none() {
            self.look_for(header, &mut state).ok()?;
        }
        let upper = state.upper.clone().map(Source::Upper);
        upper.or_else(|| state.host.clone().map(Source::Lower))
    }

    fn attributes_lent(&self, header: &InHeader) -> bool {
        let shared = self.shared();
        let Some(mut attr) = shared.upper.find(header.nodeid).and_then(|file| file.attr()) else {
            return false;
        };
        attr.ino = shared.served.ino(header.nodeid).unwrap_or(attr.ino);
        self.device.answer_body(header.unique, &shared.remember.attr_out_of(&attr));
        true
    }

    pub(super) fn read_lent(
        &mut self,
        header: &InHeader,
        request: &[u8],
        file: &UpperFile,
    ) -> Result<(), Errno> {
        let (offset, size) = (u64_at(request, IN_HEADER + 8), u32_at(request, IN_HEADER + 16).min(MAX_DATA));
        if self.data.len() < size as usize {
            self.data.resize(size as usize, 0);
        }
        let done = read_at(file, &mut self.data[..size as usize], offset).map_err(errno)?;
        self.talk.shared.upper.count_read();
        self.device.answer_body(header.unique, &self.data[..done]);
        Ok(())
    }

    /// Closes a file that the guest has opened and that the kernel does not hear of.
    pub(super) fn close_in_guest(&self, header: &InHeader, handle: u64) {
        let mut release = Vec::with_capacity(24);
        release.u64(handle).u64(0).u64(0);
        self.talk.tell(&mut message(&InHeader { opcode: op::RELEASE, ..*header }, &release));
    }

    /// Opens a file in the guest that cannot be used here, though the guest lends it.
    pub(super) fn open_unlent(
        &mut self,
        header: &InHeader,
        request: &mut [u8],
        handle: u64,
    ) -> Result<(), Errno> {
        self.close_in_guest(header, handle);
        let (flags, how) = (u32_at(request, IN_HEADER), u32_at(request, IN_HEADER + 4));
        if how & flag::OPEN_NOT_LENT != 0 {
            return Err(libc::EIO);
        }
        // It is cut already, and may have been written to since.
        let flags = flags & !libc::O_TRUNC.cast_unsigned();
        put_u64_at(request, IN_HEADER, u64::from(flags) | u64::from(how | flag::OPEN_NOT_LENT) << 32);
        self.ask_guest(header, request)
    }
}

/// Whether a request is about what a file holds, or about what changes with that.
fn is_of_contents(opcode: u32) -> bool {
    matches!(
        opcode,
        op::READ | op::WRITE | op::FSYNC | op::FALLOCATE | op::LSEEK | op::GETATTR | op::COPY_FILE_RANGE
    )
}

/// What the kernel is told, if it was not yet.
type Done = Result<Option<Vec<u8>>, Errno>;

fn write(file: &UpperFile, header: &InHeader, body: &[u8]) -> Done {
    let (offset, size, write_flags) = (u64_at(body, 8), u32_at(body, 16), u32_at(body, 20));
    let data = body.get(WRITE_IN..WRITE_IN + size as usize).ok_or(libc::EINVAL)?;
    let how = how_to_write(u32_at(body, 32), write_flags);
    let _clearing = clearing(header, write_flags & flag::WRITE_KILL_SUIDGID != 0)?;
    written(write_at(file, data, offset, how).map_err(errno)?)
}

fn written(count: u32) -> Done {
    let mut answer = Vec::with_capacity(8);
    answer.u32(count).u32(0);
    Ok(Some(answer))
}

fn how_to_write(open_flags: u32, write_flags: u32) -> ReadWriteFlags {
    let is = |wanted: i32| open_flags.cast_signed() & wanted == wanted;
    let mut how = ReadWriteFlags::empty();
    // What comes from the kernel's cache has its place already; else the end is where it is now.
    how.set(ReadWriteFlags::APPEND, is(libc::O_APPEND) && write_flags & flag::WRITE_CACHE == 0);
    how.set(ReadWriteFlags::DSYNC, is(libc::O_DSYNC));
    how.set(ReadWriteFlags::SYNC, is(libc::O_SYNC));
    how
}

fn allocate(file: &UpperFile, header: &InHeader, body: &[u8]) -> Done {
    let (offset, length, mode) = (u64_at(body, 8), u64_at(body, 16), u32_at(body, 24));
    // The message cannot say whether the caller may keep set-ID bits: root may.
    let _clearing = clearing(header, header.uid != 0)?;
    rustix::fs::fallocate(file, FallocateFlags::from_bits_retain(mode), offset, length).map_err(errno)?;
    Ok(Some(Vec::new()))
}

fn sync(file: &UpperFile, body: &[u8]) -> Result<(), Errno> {
    let data_only = u32_at(body, 8) & flag::FSYNC_FDATASYNC != 0;
    let done = if data_only { rustix::fs::fdatasync(file) } else { rustix::fs::fsync(file) };
    done.map_err(errno)
}

fn seek(file: &UpperFile, body: &[u8]) -> Done {
    let (offset, whence) = (u64_at(body, 8), u32_at(body, 16));
    let to = match whence.cast_signed() {
        libc::SEEK_DATA => SeekFrom::Data(offset),
        libc::SEEK_HOLE => SeekFrom::Hole(offset),
        _ => return Err(libc::EINVAL),
    };
    let mut answer = Vec::with_capacity(8);
    answer.u64(rustix::fs::seek(file, to).map_err(errno)?);
    Ok(Some(answer))
}

fn copy(from: &impl AsFd, to: &UpperFile, header: &InHeader, body: &[u8]) -> Done {
    let (mut offset, mut out_offset) = (u64_at(body, 8), u64_at(body, 32));
    let (length, flags) = (u64_at(body, 40), u64_at(body, 48));
    if flags != 0 {
        return Err(libc::EINVAL);
    }
    let _clearing = clearing(header, header.uid != 0)?;
    let length = copy_length(length);
    let copied = rustix::fs::copy_file_range(from, Some(&mut offset), to, Some(&mut out_offset), length);
    written(copied.map_err(errno)? as u32)
}

/// Writes as the caller if `wanted`.
fn clearing(header: &InHeader, wanted: bool) -> Result<Option<Unprivileged>, Errno> {
    wanted.then(|| privileges::clearing_set_ids(header.gid)).transpose().map_err(errno)
}

/// To the kernel, ENOSYS would mean "never ask again".
fn errno(errno: rustix::io::Errno) -> Errno {
    if errno == rustix::io::Errno::NOSYS { libc::EOPNOTSUPP } else { errno.raw_os_error() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_flags_say_how_to_write() {
        let of = |open_flags: i32, write_flags| how_to_write(open_flags.cast_unsigned(), write_flags);
        assert_eq!(of(libc::O_RDWR, 0), ReadWriteFlags::empty());
        assert_eq!(of(libc::O_WRONLY | libc::O_APPEND, 0), ReadWriteFlags::APPEND);
        assert_eq!(of(libc::O_WRONLY | libc::O_APPEND, flag::WRITE_CACHE), ReadWriteFlags::empty());
        assert_eq!(of(libc::O_DSYNC, 0), ReadWriteFlags::DSYNC);
        assert!(of(libc::O_SYNC, 0).contains(ReadWriteFlags::SYNC));
    }
}
