//! What is in files.

use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::handles::Handle;
use super::lend::forget_contents;
use super::message::{Answer, Request};
use super::nodes::{Node, stat};
use super::server::{Failure, Server};
use crate::export::bytes::{copy_length, read_at, write_at};
use crate::export::wire::abi::{MAX_DATA, flag};
use crate::export::wire::codec::Put;

impl Server {
    pub(super) fn read(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let body = &mut request.body;
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        // Flags and the lock owner, which only matter to mandatory locks.
        body.bytes(20)?;
        body.end()?;
        let handle = self.handles.find(handle, request.header.nodeid)?;
        let size = size.min(MAX_DATA) as usize;
        let done = read_at(handle.file(&self.room)?, answer.room(size), offset)?;
        answer.shorten(size - done);
        Ok(())
    }

    pub(super) fn open_read(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let body = &mut request.body;
        let (_flags, how) = (body.u32()?, body.u32()?);
        let (offset, size) = (body.u64()?, body.u32()?);
        body.u32()?;
        body.end()?;
        let node = self.nodes.find(request.header.nodeid)?;
        if how & flag::OPEN_NOT_LENT == 0
            && let Some(place) = self.place(&node)
        {
            answer.u64(0).u64(0);
            let before = answer.body_len();
            place.put(answer);
            answer.patch_u64(8, (answer.body_len() - before) as u64);
            return Ok(());
        }
        let file = self.room.with(|| node.open(OFlags::RDONLY))?;
        if how & flag::OPEN_NOT_LENT != 0 {
            forget_contents(&file)?;
        }
        node.lent.with_contents(|| forget_contents(&file))?;
        let size = size.min(MAX_DATA) as usize;
        answer.u64(0).u64(0);
        // With a hint go no data: the host has them at hand.
        let hint = self.put_hint(&node, &file, offset, size, answer)?;
        let size = if hint { 0 } else { size };
        let done = read_at(&file, answer.room(size), offset)?;
        answer.shorten(size - done);
        if hint || !is_all(&file, offset, done, size)? {
            answer.patch_u64(0, self.handles.add(Handle::new(node, file, false)));
        }
        Ok(())
    }

    /// Appends where a file's bytes are, if it is worth it: if there are more than are read now.
    fn put_hint(
        &self,
        node: &Node,
        file: &OwnedFd,
        offset: u64,
        size: usize,
        answer: &mut Answer,
    ) -> rustix::io::Result<bool> {
        let Some(layers) = &self.layers else { return Ok(false) };
        if offset.saturating_add(size as u64) >= stat(file)?.stx_size {
            return Ok(false);
        }
        let Some(hint) = layers.find(&self.root, node) else { return Ok(false) };
        let before = answer.body_len();
        hint.put(answer);
        answer.patch_u64(8, (answer.body_len() - before) as u64);
        Ok(true)
    }

    pub(super) fn write(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let body = &mut request.body;
        let (handle, offset, size, write_flags) = (body.u64()?, body.u64()?, body.u32()?, body.u32()?);
        let _lock_owner = body.u64()?;
        let open_flags = OFlags::from_bits_retain(body.u32()?);
        body.u32()?;
        let data = body.bytes(size as usize)?;
        body.end()?;
        let handle = self.handles.find(handle, request.header.nodeid)?;
        let file = handle.file(&self.room)?;
        let _clearing = request.caller.clearing_set_ids(write_flags & flag::WRITE_KILL_SUIDGID != 0)?;
        // What comes from the host's cache has its place already; else the end is where it is now.
        let append = open_flags.contains(OFlags::APPEND) && write_flags & flag::WRITE_CACHE == 0;
        let how = if append { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
        let written = write_at(file, data, offset, how)?;
        answer.u32(written).u32(0);
        Ok(())
    }

    pub(super) fn fsync(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        let (handle, flags) = (request.body.u64()?, request.body.u32()?);
        request.body.u32()?;
        request.body.end()?;
        let handle = self.handles.find(handle, request.header.nodeid)?;
        let data_only = flags & flag::FSYNC_FDATASYNC != 0;
        let sync = if data_only { rustix::fs::fdatasync } else { rustix::fs::fsync };
        Ok(sync(handle.file(&self.room)?)?)
    }

    pub(super) fn syncfs(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        request.body.u64()?;
        request.body.end()?;
        Ok(rustix::fs::syncfs(&self.root)?)
    }

    pub(super) fn fallocate(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        let body = &mut request.body;
        let (handle, offset, length, mode) = (body.u64()?, body.u64()?, body.u64()?, body.u32()?);
        body.u32()?;
        body.end()?;
        let handle = self.handles.find(handle, request.header.nodeid)?;
        let file = handle.file(&self.room)?;
        // The message cannot say whether the caller may keep set-ID bits: root may.
        let _clearing = request.caller.clearing_set_ids(!request.caller.is_root())?;
        Ok(rustix::fs::fallocate(file, FallocateFlags::from_bits_retain(mode), offset, length)?)
    }

    pub(super) fn lseek(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let body = &mut request.body;
        let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
        body.u32()?;
        body.end()?;
        let handle = self.handles.find(handle, request.header.nodeid)?;
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        answer.u64(rustix::fs::seek(handle.file(&self.room)?, to)?);
        Ok(())
    }

    pub(super) fn copy_file_range(
        &self,
        request: &mut Request<'_>,
        answer: &mut Answer,
    ) -> Result<(), Failure> {
        let body = &mut request.body;
        let (handle, mut offset) = (body.u64()?, body.u64()?);
        let (out_node, out_handle, mut out_offset) = (body.u64()?, body.u64()?, body.u64()?);
        let (length, flags) = (body.u64()?, body.u64()?);
        body.end()?;
        if flags != 0 {
            return Err(Errno::INVAL.into());
        }
        let from = self.handles.find(handle, request.header.nodeid)?;
        let to = self.handles.find(out_handle, out_node)?;
        let (from, to) = (from.file(&self.room)?, to.file(&self.room)?);
        let _clearing = request.caller.clearing_set_ids(!request.caller.is_root())?;
        let length = copy_length(length);
        let copied = rustix::fs::copy_file_range(from, Some(&mut offset), to, Some(&mut out_offset), length)?;
        // An overlay takes for the file's end what was it before the host wrote.
        let beyond = copy_by_hand((from, offset), (to, out_offset), length - copied);
        let copied = if copied == 0 { beyond? } else { copied + beyond.unwrap_or_default() };
        answer.u32(copied as u32).u32(0);
        Ok(())
    }
}

/// Whether what was read reaches the file's end.
fn is_all(file: &OwnedFd, offset: u64, done: usize, size: usize) -> rustix::io::Result<bool> {
    Ok(done < size || offset.saturating_add(done as u64) >= stat(file)?.stx_size)
}

/// Copies some of a file, as long as there is any.
fn copy_by_hand(
    (from, offset): (&OwnedFd, u64),
    (to, out_offset): (&OwnedFd, u64),
    length: usize,
) -> rustix::io::Result<usize> {
    if length == 0 {
        return Ok(0);
    }
    let mut data = vec![0; length.min(MAX_DATA as usize)];
    let there = read_at(from, &mut data, offset)?;
    Ok(write_at(to, &data[..there], out_offset, ReadWriteFlags::empty())? as usize)
}
