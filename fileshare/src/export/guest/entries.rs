//! Names: finding, making, moving and removing them.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, PoisonError};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::caller::Caller;
use super::handles::Handle;
use super::lend::forget_contents;
use super::message::{Answer, Request};
use super::nodes::{Node, magic};
use super::server::{Failure, Server};
use crate::export::stat::device;
use crate::export::wire::abi::{Attr, CAPABILITIES, NO_CAPABILITIES, PATH_MAX, flag};
use crate::export::wire::codec::Put;

/// What of the caller's open(2) flags is done here. Appending is told by each write, direct transfers need
/// aligned memory that a message does not have, and access times are the guest's.
const PASSED: OFlags = OFlags::RWMODE.union(OFlags::SYNC).union(OFlags::DSYNC);

impl Server {
    pub(super) fn lookup(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let name = request.body.name()?;
        request.body.end()?;
        let parent = self.nodes.find(request.header.nodeid)?;
        match self.look(&parent, name) {
            Ok((node, attr)) => {
                answer.entry(node.id, attr);
                self.put_pure(&node, &attr, answer);
            }
            // An answer that can be remembered, unlike an error.
            Err(Errno::NOENT) => answer.entry(0, Attr::default()),
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// Appends where a folder lies, if it lies in one lower layer only.
    fn put_pure(&self, node: &Node, attr: &Attr, answer: &mut Answer) {
        let folder = self.layers.as_ref().filter(|_| attr.kind() == libc::S_IFDIR);
        let Some(parts) = folder.and_then(|layers| layers.parts(&self.root, node)) else { return };
        if let Some(layer) = parts.only {
            answer.u32(layer.into()).u32(0).bytes(parts.path.as_os_str().as_bytes());
        }
    }

    pub(super) fn find(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let mut parent = self.nodes.find(request.header.nodeid)?;
        let mut found = Vec::new();
        while !request.body.rest().is_empty() {
            let (node, attr) = match self.look(&parent, request.body.name()?) {
                Ok(one) => one,
                Err(errno) => {
                    // The host hears of none of them.
                    found.iter().for_each(|id| self.nodes.forget(*id, 1));
                    return Err(errno.into());
                }
            };
            found.push(node.id);
            answer.entry(node.id, attr);
            parent = node;
        }
        Ok(())
    }

    pub(super) fn look(&self, parent: &Node, name: &CStr) -> rustix::io::Result<(Arc<Node>, Attr)> {
        self.room.with(|| self.look_once(parent, name))
    }

    /// The same where there is room, or room is being made.
    pub(super) fn look_once(&self, parent: &Node, name: &CStr) -> rustix::io::Result<(Arc<Node>, Attr)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.nodes.admit(rustix::fs::openat(parent, name, flags, Mode::empty())?)
    }

    pub(super) fn mknod(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let body = &mut request.body;
        let (mode, rdev, umask) = (body.u32()?, body.u32()?, body.u32()?);
        body.u32()?;
        let name = body.name()?;
        body.end()?;
        self.make(request, name, umask, answer, |parent| {
            let kind = FileType::from_raw_mode(mode);
            rustix::fs::mknodat(parent, name, kind, Mode::from_raw_mode(mode & 0o7777), device(rdev))
        })
    }

    pub(super) fn mkdir(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let (mode, umask) = (request.body.u32()?, request.body.u32()?);
        let name = request.body.name()?;
        request.body.end()?;
        self.make(request, name, umask, answer, |parent| {
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode & 0o7777))
        })
    }

    pub(super) fn symlink(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let (name, target) = (request.body.name()?, request.body.string()?);
        request.body.end()?;
        self.make(request, name, 0, answer, |parent| rustix::fs::symlinkat(target, parent, name))
    }

    /// Makes something as the caller, and tells the host of it.
    fn make(
        &self,
        request: &Request<'_>,
        name: &CStr,
        umask: u32,
        answer: &mut Answer,
        how: impl Fn(&Node) -> rustix::io::Result<()>,
    ) -> Result<(), Failure> {
        let parent = self.nodes.find(request.header.nodeid)?;
        {
            let _acting = request.caller.act(umask)?;
            self.room.with(|| how(&parent))?;
        }
        let (node, attr) = self.look(&parent, name)?;
        answer.entry(node.id, attr);
        parent.attr()?.put(answer);
        Ok(())
    }

    pub(super) fn link(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let old = self.nodes.find(request.body.u64()?)?;
        let name = request.body.name()?;
        request.body.end()?;
        let parent = self.nodes.find(request.header.nodeid)?;
        let renumbering = self.nodes.renumbering([Arc::clone(&old)]);
        rustix::fs::linkat(CWD, magic(&*old), &*parent, name, AtFlags::SYMLINK_FOLLOW)?;
        drop(renumbering);
        answer.entry(old.id, self.nodes.again(&old)?);
        parent.attr()?.put(answer);
        Ok(())
    }

    pub(super) fn readlink(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        request.body.end()?;
        let node = self.nodes.find(request.header.nodeid)?;
        let target = rustix::fs::readlinkat(&*node, c"", Vec::with_capacity(PATH_MAX))?;
        answer.bytes(target.to_bytes());
        Ok(())
    }

    pub(super) fn unlink(
        &self,
        request: &mut Request<'_>,
        answer: &mut Answer,
        flags: AtFlags,
    ) -> Result<(), Failure> {
        let name = request.body.name()?;
        request.body.end()?;
        let parent = self.nodes.find(request.header.nodeid)?;
        {
            let _moving = self.lender.moving();
            rustix::fs::unlinkat(&*parent, name, flags)?;
        }
        parent.attr()?.put(answer);
        Ok(())
    }

    pub(super) fn rename(
        &self,
        request: &mut Request<'_>,
        answer: &mut Answer,
        with_flags: bool,
    ) -> Result<(), Failure> {
        let to = self.nodes.find(request.body.u64()?)?;
        let flags = if with_flags { request.body.u64()? } else { 0 };
        let flags = RenameFlags::from_bits(flags as u32).ok_or(Errno::INVAL)?;
        let (old, new) = (request.body.name()?, request.body.name()?);
        request.body.end()?;
        let from = self.nodes.find(request.header.nodeid)?;
        {
            let files = [(&from, old), (&to, new)];
            let files =
                files.into_iter().filter_map(|(folder, name)| self.nodes.one_of_several(folder, name));
            let _renumbering = self.nodes.renumbering(files);
            let _moving = self.lender.moving();
            rustix::fs::renameat_with(&*from, old, &*to, new, flags)?;
        }
        to.attr()?.put(answer);
        from.attr()?.put(answer);
        Ok(())
    }

    pub(super) fn open(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let (flags, open_flags) = (request.body.u32()?, request.body.u32()?);
        request.body.end()?;
        let node = self.nodes.find(request.header.nodeid)?;
        let writes = is_writable(OFlags::from_bits_retain(flags));
        if writes && self.lender.is_on() {
            let (handle, place) = self.open_to_lend(&request.caller, &node, (flags, open_flags))?;
            let bare = place.is_none() && has_no_capabilities(&node);
            answer.u64(handle).u32(0).u32(if bare { NO_CAPABILITIES } else { 0 });
            place.into_iter().for_each(|place| place.put(answer));
            return Ok(());
        }
        let handle = self.open_node(&request.caller, Arc::clone(&node), (flags, open_flags))?;
        let bare = writes && has_no_capabilities(&node);
        answer.u64(handle).u32(0).u32(if bare { NO_CAPABILITIES } else { 0 });
        Ok(())
    }

    fn open_node(
        &self,
        caller: &Caller,
        node: Arc<Node>,
        (flags, open_flags): (u32, u32),
    ) -> Result<u64, Failure> {
        let asked = OFlags::from_bits_retain(flags);
        let file = self.open_file(caller, &node, (asked, open_flags))?;
        if self.lender.is_on() {
            forget_contents(&file)?;
        }
        Ok(self.handles.add(Handle::new(node, file, is_writable(asked))))
    }

    pub(super) fn open_file(
        &self,
        caller: &Caller,
        node: &Arc<Node>,
        (asked, open_flags): (OFlags, u32),
    ) -> rustix::io::Result<OwnedFd> {
        let changes = is_writable(asked) || asked.contains(OFlags::TRUNC);
        let _renumbering = self.nodes.renumbering(changes.then(|| Arc::clone(node)));
        let file = self.room.with(|| node.open(self.passed(asked)))?;
        if asked.contains(OFlags::TRUNC) {
            let _clearing = caller.clearing_set_ids(open_flags & flag::OPEN_KILL_SUIDGID != 0)?;
            rustix::fs::ftruncate(&file, 0)?;
        }
        Ok(file)
    }

    /// With a write-back cache, the host's kernel reads what it needs to fill a page that is being written.
    pub(super) fn passed(&self, asked: OFlags) -> OFlags {
        let flags = asked & PASSED;
        // Who opens to read may cut the file, too.
        if asked.contains(OFlags::TRUNC) && flags & OFlags::RWMODE == OFlags::RDONLY {
            return flags | OFlags::RDWR;
        }
        if self.writeback() && flags & OFlags::RWMODE == OFlags::WRONLY {
            (flags - OFlags::RWMODE) | OFlags::RDWR
        } else {
            flags
        }
    }

    pub(super) fn create(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let body = &mut request.body;
        let (flags, mode, umask, open_flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let name = body.name()?;
        body.end()?;
        let parent = self.nodes.find(request.header.nodeid)?;
        let asked = OFlags::from_bits_retain(flags);
        let how = (self.passed(asked) | OFlags::CREATE | OFlags::EXCL, mode, umask);
        let made = if self.lender.is_on() {
            self.make_to_lend(&request.caller, &parent, name, (asked, mode, umask), answer)
        } else {
            self.room
                .with(|| make_file(&request.caller, &parent, name, how))
                .and_then(|file| self.answer_opened(file, asked, answer))
        };
        match made {
            Ok(()) => {}
            // Somebody else was first: then it is an open.
            Err(Errno::EXIST) if !asked.contains(OFlags::EXCL) => {
                let (node, attr) = self.look(&parent, name)?;
                answer.entry(node.id, attr);
                let opened = self.open_node(&request.caller, Arc::clone(&node), (flags, open_flags));
                answer.open(opened.inspect_err(|_| self.nodes.forget(node.id, 1))?);
            }
            Err(errno) => return Err(errno.into()),
        }
        parent.attr()?.put(answer);
        Ok(())
    }

    pub(super) fn tmpfile(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let body = &mut request.body;
        let (flags, mode, umask, _) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        // The kernel sends the name "#", which means nothing.
        body.string()?;
        body.end()?;
        let parent = self.nodes.find(request.header.nodeid)?;
        let asked = OFlags::from_bits_retain(flags);
        // Without O_EXCL, so that it can be linked.
        let how = (self.passed(asked) | OFlags::TMPFILE, mode, umask);
        let file = make_file(&request.caller, &parent, c".", how)?;
        Ok(self.answer_opened(file, asked, answer)?)
    }

    /// Tells the host of a file that was just made, through the very descriptor that made it.
    fn answer_opened(&self, file: OwnedFd, asked: OFlags, answer: &mut Answer) -> rustix::io::Result<()> {
        let path_only = rustix::fs::open(magic(&file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let (node, attr) = self.nodes.admit(path_only)?;
        answer.entry(node.id, attr);
        answer.open(self.handles.add(Handle::new(node, file, is_writable(asked))));
        Ok(())
    }
}

fn make_file(
    caller: &Caller,
    parent: &Node,
    name: &CStr,
    (flags, mode, umask): (OFlags, u32, u32),
) -> rustix::io::Result<OwnedFd> {
    let _acting = caller.act(umask)?;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(mode & 0o7777))
}

/// Asked here once, where it costs little, instead of by the host's kernel before the first write.
fn has_no_capabilities(node: &Node) -> bool {
    let mut bare = node.bare.lock().unwrap_or_else(PoisonError::into_inner);
    *bare = *bare || rustix::fs::getxattr_query(magic(node), CAPABILITIES) == Err(Errno::NODATA);
    *bare
}

pub(super) fn is_writable(flags: OFlags) -> bool {
    flags & OFlags::RWMODE != OFlags::RDONLY
}
