//! Locks that the host's processes hold on files, as the guest's kernel knows them.
//!
//! ```text
//!   flock    on the handle's own open file: it belongs to that, wherever it is inherited
//!   fcntl    on an open file per (node, owner) that exists for nothing else; closing it drops all the owner's locks
//!            the owner is a process, which says when it closes the file, or an open file, which is released
//! ```
//!
//! Both are locks of the guest's kernel, so they hold against processes in the guest too. The second kind are
//! "open file description" locks: the guest cannot take POSIX locks in the name of the host's processes.
//!
//! Nothing here waits: [`super::waits`] tries again.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::handles::Handle;
use super::message::{Answer, Request};
use super::server::{Failure, Server};
use crate::export::wire::abi::flag;
use crate::export::wire::codec::{Malformed, Put, Take};

/// `F_RDLCK`, `F_WRLCK`, `F_UNLCK`.
const KINDS: [u32; 3] = [libc::F_RDLCK as u32, libc::F_WRLCK as u32, libc::F_UNLCK as u32];

/// A lock that is asked for, or about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    handle: u64,
    node: u64,
    owner: u64,
    start: u64,
    end: u64,
    kind: u32,
    pid: u32,
    flock: bool,
}

/// The owners of fcntl locks.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<HashMap<(u64, u64), Arc<Owner>>>);

/// One owner's locks on one file.
#[derive(Debug)]
struct Owner {
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    file: OwnedFd,
    writable: bool,
    /// What is locked through a file that is open for reading only, to be locked again through another.
    shared: Ranges,
    pid: u32,
    /// Through which open file of the host's it was last asked for.
    handle: u64,
}

/// Sets of bytes, both ends included.
#[derive(Debug, Default)]
struct Ranges(Vec<(u64, u64)>);

impl Wish {
    /// `fuse_lk_in`.
    pub(super) fn take(node: u64, body: &mut Take<'_>) -> Result<Self, Malformed> {
        let (handle, owner) = (body.u64()?, body.u64()?);
        let (start, end, kind, pid) = (body.u64()?, body.u64()?, body.u32()?, body.u32()?);
        let flock = body.u32()? & flag::LK_FLOCK != 0;
        body.u32()?;
        if !KINDS.contains(&kind) || start > end || end > i64::MAX.cast_unsigned() {
            return Err(Malformed("a lock of no kind or range"));
        }
        Ok(Self { handle, node, owner, start, end, kind, pid, flock })
    }

    fn is_unlock(&self) -> bool {
        self.kind == libc::F_UNLCK as u32
    }

    fn to_kernel(self) -> libc::flock {
        // To the end of all files is a length of 0.
        let length = if self.end == i64::MAX.cast_unsigned() { 0 } else { self.end - self.start + 1 };
        libc::flock {
            l_type: self.kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start.cast_signed(),
            l_len: length.cast_signed(),
            l_pid: 0,
        }
    }
}

impl Server {
    pub(super) fn getlk(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let wish = Wish::take(request.header.nodeid, &mut request.body)?;
        request.body.end()?;
        let handle = self.handles.find(wish.handle, wish.node)?;
        let owner = self.locks.owner(&wish, &handle)?;
        let mut lock = wish.to_kernel();
        fcntl(&lock_guard(&owner.held).file, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(from_nix)?;
        let start = lock.l_start.cast_unsigned();
        let end = match lock.l_len {
            0 => i64::MAX.cast_unsigned(),
            length => start + length.cast_unsigned() - 1,
        };
        let kind = u32::from(lock.l_type.cast_unsigned());
        let pid = self.locks.holder(&wish, kind);
        answer.u64(start).u64(end).u32(kind).u32(pid);
        Ok(())
    }

    pub(super) fn setlk(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        let wish = Wish::take(request.header.nodeid, &mut request.body)?;
        request.body.end()?;
        Ok(self.lock(&wish)?)
    }

    /// Takes or drops a lock, or says EAGAIN.
    pub(super) fn lock(&self, wish: &Wish) -> rustix::io::Result<()> {
        let handle = self.handles.find(wish.handle, wish.node)?;
        if wish.flock {
            flock(handle.file_to_lock(&self.room)?, wish)?;
        } else {
            self.locks.owner(wish, &handle)?.set(wish, &handle)?;
            // Who closed it meanwhile has not seen this lock.
            let open = self.handles.find(wish.handle, wish.node);
            open.inspect_err(|_| self.locks.drop_owner(wish.node, wish.owner))?;
        }
        if wish.is_unlock() {
            self.waits.something_changed();
        }
        Ok(())
    }

    /// A process closed the file: that drops its fcntl locks.
    pub(super) fn flush(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        let (handle, _) = (request.body.u64()?, request.body.u64()?);
        let owner = request.body.u64()?;
        request.body.end()?;
        self.handles.find(handle, request.header.nodeid)?.owners().remove(&owner);
        self.locks.drop_owner(request.header.nodeid, owner);
        self.waits.something_changed();
        Ok(())
    }
}

fn flock(file: &OwnedFd, wish: &Wish) -> rustix::io::Result<()> {
    let operation = match wish.kind.cast_signed() {
        libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
        libc::F_WRLCK => FlockOperation::NonBlockingLockExclusive,
        _ => FlockOperation::Unlock,
    };
    rustix::fs::flock(file, operation)
}

impl Locks {
    fn owner(&self, wish: &Wish, handle: &Handle) -> rustix::io::Result<Arc<Owner>> {
        handle.owners().insert(wish.owner);
        let mut owners = lock_guard(&self.0);
        if let Some(owner) = owners.get(&(wish.node, wish.owner)) {
            return Ok(Arc::clone(owner));
        }
        let owner = Arc::new(Owner { held: Mutex::new(Held { handle: wish.handle, ..Held::open(handle)? }) });
        owners.insert((wish.node, wish.owner), Arc::clone(&owner));
        Ok(owner)
    }

    fn drop_owner(&self, node: u64, owner: u64) {
        let gone = lock_guard(&self.0).remove(&(node, owner));
        drop(gone);
    }

    /// The host closed a file for good. A process drops its locks before; those that belong to the open file itself
    /// (`F_OFD_SETLK`) go now, and of nobody else can there be any that were last asked for through it.
    pub(super) fn close(&self, id: u64, closed: &Handle) {
        let mut owners = lock_guard(&self.0);
        let mut gone = Vec::new();
        for owner in closed.owners().iter() {
            let key = (closed.node.id, *owner);
            if owners.get(&key).is_some_and(|owner| lock_guard(&owner.held).handle == id) {
                gone.extend(owners.remove(&key));
            }
        }
        drop(owners);
        drop(gone);
    }

    /// Whoever of the others is known to have a lock on this file; 0 if it can be somebody in the guest.
    fn holder(&self, wish: &Wish, kind: u32) -> u32 {
        if kind == libc::F_UNLCK as u32 {
            return 0;
        }
        let owners = lock_guard(&self.0);
        let mut others =
            owners.iter().filter(|((node, owner), _)| *node == wish.node && *owner != wish.owner);
        match (others.next(), others.next()) {
            (Some((_, only)), None) => lock_guard(&only.held).pid,
            _ => 0,
        }
    }
}

impl Owner {
    fn set(&self, wish: &Wish, handle: &Handle) -> rustix::io::Result<()> {
        let mut held = lock_guard(&self.held);
        held.handle = wish.handle;
        if handle.writable && !held.writable {
            held.make_writable(handle)?;
        }
        let lock = wish.to_kernel();
        fcntl(&held.file, FcntlArg::F_OFD_SETLK(&lock)).map_err(from_nix)?;
        held.pid = wish.pid;
        if !held.writable {
            held.shared.set(wish.start, wish.end, !wish.is_unlock());
        }
        Ok(())
    }
}

impl Held {
    fn open(handle: &Handle) -> rustix::io::Result<Self> {
        let flags = if handle.writable { OFlags::RDWR } else { OFlags::RDONLY };
        let file = handle.node.open(flags)?;
        Ok(Self { file, writable: handle.writable, shared: Ranges::default(), pid: 0, handle: 0 })
    }

    /// Moves the locks to a file that can take exclusive ones too. All so far are shared, so both files can hold
    /// them at once and nobody comes between.
    fn make_writable(&mut self, handle: &Handle) -> rustix::io::Result<()> {
        let next = Self::open(handle)?;
        for (start, end) in &self.shared.0 {
            let kind = libc::F_RDLCK as u32;
            let (start, end) = (*start, *end);
            let wish = Wish { handle: 0, node: 0, owner: 0, start, end, kind, pid: 0, flock: false };
            fcntl(&next.file, FcntlArg::F_OFD_SETLK(&wish.to_kernel())).map_err(from_nix)?;
        }
        *self = Self { pid: self.pid, handle: self.handle, ..next };
        Ok(())
    }
}

impl Ranges {
    /// Adds or removes the bytes from `start` to `end`.
    fn set(&mut self, start: u64, end: u64, locked: bool) {
        let mut rest = Vec::with_capacity(self.0.len() + 2);
        for (first, last) in self.0.drain(..) {
            if last < start || first > end {
                rest.push((first, last));
                continue;
            }
            if first < start {
                rest.push((first, start - 1));
            }
            if last > end {
                rest.push((end + 1, last));
            }
        }
        if locked {
            rest.push((start, end));
        }
        self.0 = rest;
    }
}

fn lock_guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn from_nix(errno: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno as i32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_are_the_bytes_that_were_set(
            changes in prop::collection::vec((0u64..40, 0u64..40, any::<bool>()), 0..20),
        ) {
            let mut ranges = Ranges::default();
            let mut bytes = [false; 40];
            for (one, other, locked) in changes {
                let (start, end) = (one.min(other), one.max(other));
                ranges.set(start, end, locked);
                bytes[start as usize..=end as usize].fill(locked);
            }
            let mut seen = [0; 40];
            for (start, end) in ranges.0 {
                seen[start as usize..=end as usize].iter_mut().for_each(|count| *count += 1);
            }
            prop_assert_eq!(seen.map(|count| count == 1), bytes);
            prop_assert!(seen.iter().all(|count| *count <= 1));
        }
    }
}
