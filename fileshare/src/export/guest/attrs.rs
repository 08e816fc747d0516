//! Attributes: of files, of file systems, extended.

use std::sync::{Arc, PoisonError};

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::caller::Caller;
use super::message::{Answer, Request};
use super::nodes::{Node, magic, stat};
use super::server::{Failure, Server};
use crate::export::wire::abi::flag;
use crate::export::wire::codec::{Malformed, Put, Take};

/// The most that an extended attribute, or the list of their names, can hold.
const XATTR_MAX: u32 = 65_536;

/// `fuse_setattr_in`.
struct Change {
    valid: u32,
    handle: u64,
    size: u64,
    times: [(u64, u32); 2],
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Change {
    fn take(body: &mut Take<'_>) -> Result<Self, Malformed> {
        let valid = body.u32()?;
        body.u32()?;
        let (handle, size) = (body.u64()?, body.u64()?);
        let _lock_owner = body.u64()?;
        let (atime, mtime, _ctime) = (body.u64()?, body.u64()?, body.u64()?);
        let (atimensec, mtimensec, _ctimensec) = (body.u32()?, body.u32()?, body.u32()?);
        let mode = body.u32()?;
        body.u32()?;
        let (uid, gid) = (body.u32()?, body.u32()?);
        body.u32()?;
        Ok(Self { valid, handle, size, times: [(atime, atimensec), (mtime, mtimensec)], mode, uid, gid })
    }

    fn has(&self, flags: u32) -> bool {
        self.valid & flags != 0
    }

    fn time(&self, at: usize, set: u32, now: u32) -> Timespec {
        let (seconds, nanoseconds) = self.times[at];
        match () {
            () if self.has(now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            () if self.has(set) => Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.into() },
            () => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        }
    }
}

impl Server {
    pub(super) fn getattr(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        // The handle that may come with it leads to the same inode.
        request.body.bytes(16)?;
        request.body.end()?;
        answer.attr(&self.nodes.find(request.header.nodeid)?.attr()?);
        Ok(())
    }

    pub(super) fn setattr(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let change = Change::take(&mut request.body)?;
        request.body.end()?;
        let node = self.nodes.find(request.header.nodeid)?;
        let _renumbering = self.nodes.renumbering([Arc::clone(&node)]);
        if change.has(flag::FATTR_MODE) {
            rustix::fs::chmodat(
                CWD,
                magic(&*node),
                Mode::from_raw_mode(change.mode & 0o7777),
                AtFlags::empty(),
            )?;
        }
        if change.has(flag::FATTR_UID | flag::FATTR_GID) {
            chown(&node, &change)?;
        }
        if change.has(flag::FATTR_SIZE) {
            self.truncate(&request.caller, &node, &change)?;
        }
        if change.has(flag::FATTR_ATIME | flag::FATTR_MTIME) {
            let last_access = change.time(0, flag::FATTR_ATIME, flag::FATTR_ATIME_NOW);
            let last_modification = change.time(1, flag::FATTR_MTIME, flag::FATTR_MTIME_NOW);
            let times = Timestamps { last_access, last_modification };
            rustix::fs::utimensat(CWD, magic(&*node), &times, AtFlags::empty())?;
        }
        // With the change came what the file is like now.
        answer.attr(&node.remembered()?);
        Ok(())
    }

    fn truncate(&self, caller: &Caller, node: &Node, change: &Change) -> Result<(), Failure> {
        let size = i64::try_from(change.size).map_err(|_| Errno::FBIG)?.cast_unsigned();
        if change.has(flag::FATTR_FH) {
            let handle = self.handles.find(change.handle, node.id)?;
            let file = handle.file(&self.room)?;
            let _clearing = caller.clearing_set_ids(change.has(flag::FATTR_KILL_SUIDGID))?;
            return Ok(rustix::fs::ftruncate(file, size)?);
        }
        let file = node.open(OFlags::WRONLY)?;
        let _clearing = caller.clearing_set_ids(change.has(flag::FATTR_KILL_SUIDGID))?;
        Ok(rustix::fs::ftruncate(file, size)?)
    }

    pub(super) fn statfs(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        request.body.end()?;
        let st = rustix::fs::fstatvfs(&*self.nodes.find(request.header.nodeid)?)?;
        answer.u64(st.f_blocks).u64(st.f_bfree).u64(st.f_bavail).u64(st.f_files).u64(st.f_ffree);
        answer.u32(small(st.f_bsize)).u32(small(st.f_namemax)).u32(small(st.f_frsize)).u32(0);
        answer.bytes(&[0; 24]);
        Ok(())
    }

    pub(super) fn getxattr(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let size = xattr_size(&mut request.body)?;
        let name = request.body.string()?;
        request.body.end()?;
        let path = magic(&*self.nodes.find(request.header.nodeid)?);
        match size {
            0 => length(answer, rustix::fs::getxattr_query(&path, name)?),
            _ => content(answer, size, |room| rustix::fs::getxattr(&path, name, room))?,
        }
        Ok(())
    }

    pub(super) fn listxattr(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let size = xattr_size(&mut request.body)?;
        request.body.end()?;
        let path = magic(&*self.nodes.find(request.header.nodeid)?);
        match size {
            0 => length(answer, rustix::fs::listxattr_query(&path)?),
            _ => content(answer, size, |room| rustix::fs::listxattr(&path, room))?,
        }
        Ok(())
    }

    pub(super) fn setxattr(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        let body = &mut request.body;
        let (size, flags, extra) = (body.u32()?, body.u32()?, body.u32()?);
        body.u32()?;
        let name = body.string()?;
        let value = body.bytes(size as usize)?;
        body.end()?;
        let node = self.nodes.find(request.header.nodeid)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let _renumbering = self.nodes.renumbering([Arc::clone(&node)]);
        {
            let mut bare = node.bare.lock().unwrap_or_else(PoisonError::into_inner);
            *bare = false;
            rustix::fs::setxattr(magic(&*node), name, value, flags)?;
        }
        if extra & flag::SETXATTR_ACL_KILL_SGID != 0 && name == c"system.posix_acl_access" {
            let mode = u32::from(stat(&*node)?.stx_mode) & 0o7777 & !libc::S_ISGID;
            rustix::fs::chmodat(CWD, magic(&*node), Mode::from_raw_mode(mode), AtFlags::empty())?;
        }
        Ok(())
    }

    pub(super) fn removexattr(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        let name = request.body.string()?;
        request.body.end()?;
        let node = self.nodes.find(request.header.nodeid)?;
        let _renumbering = self.nodes.renumbering([Arc::clone(&node)]);
        Ok(rustix::fs::removexattr(magic(&*node), name)?)
    }
}

fn chown(node: &Node, change: &Change) -> rustix::io::Result<()> {
    let uid = change.has(flag::FATTR_UID).then(|| Uid::from_raw(change.uid));
    let gid = change.has(flag::FATTR_GID).then(|| Gid::from_raw(change.gid));
    rustix::fs::chownat(node, c"", uid, gid, AtFlags::EMPTY_PATH)
}

fn xattr_size(body: &mut Take<'_>) -> Result<u32, Malformed> {
    let size = body.u32()?;
    body.u32()?;
    Ok(size.min(XATTR_MAX))
}

/// Answers who has no room yet.
fn length(answer: &mut Answer, length: usize) {
    answer.u32(small(length as u64)).u32(0);
}

/// Answers with what `get` puts into the room.
fn content(
    answer: &mut Answer,
    size: u32,
    get: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<()> {
    let length = get(answer.room(size as usize))?;
    answer.shorten(size as usize - length);
    Ok(())
}

fn small(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
