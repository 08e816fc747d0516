//! The FUSE requests, each sent to the passthrough that it is for.
//!
//! Every method here reads the same: find the node (which refuses what the guest may not name), forward, and
//! give the answer the guest's node ID.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;
use virtiofsd::passthrough::PassthroughFs;

use super::names::{Area, Node, component};
use super::owner::Kept;
use super::{At, ShareFs, UsedBy, absent, errno};

/// What of a guest's open flags reaches the host: how to access and to write through, nothing that makes files
/// (`O_CREAT`, `O_TMPFILE`), delivers signals (`O_ASYNC`) or gives a descriptor of another kind (`O_PATH`).
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_NONBLOCK
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_NOATIME
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW;

/// The same when a file is made.
const CREATE_FLAGS: i32 = OPEN_FLAGS | libc::O_CREAT | libc::O_EXCL;

/// An overlay opens files with it to read or write them.
const FILE_DATA: i32 = libc::O_NOATIME;

/// Folders are opened with it to be read: the kernel's `O_LARGEFILE`, which the C library's is not.
const FOLDER_DATA: i32 = 0o100_000;

fn flags_within(allowed: i32, flags: u32) -> u32 {
    flags & allowed.cast_unsigned()
}

/// Nothing is delayed on a descriptor that only reads, nor where layers and top lie, which are local file systems:
/// closing it needs no request.
fn skip_flush(at: &At<'_>, flags: u32, options: OpenOptions) -> OpenOptions {
    let read_only = flags_within(libc::O_ACCMODE, flags) == libc::O_RDONLY.cast_unsigned();
    if read_only || at.remembers() { options | OpenOptions::NOFLUSH } else { options }
}

impl ShareFs {
    /// Refuses to open for an ioctl that would be refused. Before it copies a file up, the guest's overlay opens it twice
    /// to ask for its flags; that there are none is what ENOTTY means to it. It opens for data with other flags than for
    /// that, which `data` has. Without an upper folder nothing is copied up, and files may be opened without an overlay.
    fn refuse_ioctls(&self, flags: u32, data: i32) -> io::Result<()> {
        let copies_up = self.used_by == UsedBy::Union && self.top.is_some();
        if copies_up && flags_within(data, flags) == 0 { Err(errno(libc::ENOTTY)) } else { Ok(()) }
    }

    /// Two nodes of one passthrough, for requests that join them.
    fn together<'a>(a: &At<'a>, b: &At<'_>) -> io::Result<&'a PassthroughFs> {
        if a.node.area == b.node.area { Ok(a.fs) } else { Err(errno(libc::EXDEV)) }
    }
}

impl FileSystem for ShareFs {
    type Inode = u64;
    type Handle = u64;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // Without this extension the passthrough keeps CAP_DAC_OVERRIDE while it makes a file as the guest's
        // user. It must: the overlay makes files in its work folder, which only root may enter. Permissions
        // are the guest kernel's to check in any case.
        let capable = capable - FsOptions::CREATE_SUPP_GROUP;
        let mut wanted = FsOptions::CACHE_SYMLINKS;
        for fs in self.areas() {
            wanted |= fs.init(capable)?;
        }
        // Listings always bring what a lookup would: the guest looks up all that it lists, as what its overlay, or
        // the host's side of an export, has to say of an entry needs that.
        Ok(wanted - FsOptions::READDIRPLUS_AUTO)
    }

    fn destroy(&self) {
        self.areas().for_each(FileSystem::destroy);
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        let at = self.at(parent)?;
        if at.node.is_share_root()
            && let Some(grafted) = self.lookup_grafted(ctx, name)
        {
            return grafted;
        }
        match at.fs.lookup(ctx, at.node.inode, name) {
            Ok(entry) => Ok(at.entry(entry)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && at.remembers() => Ok(absent()),
            Err(error) => Err(error),
        }
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.batch_forget(ctx, vec![(inode, count)]);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        let known = |(id, count): (u64, u64)| Node::parse(id).ok().map(|node| (node, count));
        let nodes: Vec<_> =
            requests.into_iter().filter_map(known).filter(|(node, _)| !node.is_root()).collect();
        for area in Area::ALL {
            let of_area = nodes.iter().filter(|(node, _)| node.area == area);
            let inodes: Vec<_> = of_area.map(|(node, count)| (node.inode, *count)).collect();
            if let Ok(fs) = self.area(area)
                && !inodes.is_empty()
            {
                fs.batch_forget(ctx, inodes);
            }
        }
    }

    fn getattr(&self, ctx: Context, inode: u64, handle: Option<u64>) -> io::Result<(fuse::Attr, Duration)> {
        let at = self.at(inode)?;
        at.fs.getattr(ctx, at.node.inode, handle)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: fuse::SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(fuse::Attr, Duration)> {
        let at = self.change(inode)?;
        let kept = Kept::before(at.fs, ctx, at.node.inode, valid);
        let changed = at.fs.setattr(ctx, at.node.inode, attr, handle, valid)?;
        match kept {
            Some(kept) => kept.restore(at.fs, ctx, at.node.inode),
            None => Ok(changed),
        }
    }

    fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>> {
        let at = self.at(inode)?;
        at.fs.readlink(ctx, at.node.inode)
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let at = self.change_in(parent, name)?;
        at.fs.symlink(ctx, target, at.node.inode, name, extensions).map(|entry| at.entry(entry))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let at = self.change_in(parent, name)?;
        let made = at.fs.mknod(ctx, at.node.inode, name, mode, rdev, umask, extensions);
        made.map(|entry| at.entry(entry))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let at = self.change_in(parent, name)?;
        at.fs.mkdir(ctx, at.node.inode, name, mode, umask, extensions).map(|entry| at.entry(entry))
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let at = self.change_in(parent, name)?;
        at.fs.unlink(ctx, at.node.inode, name)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let at = self.change_in(parent, name)?;
        at.fs.rmdir(ctx, at.node.inode, name)
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let old = self.change_in(old_parent, old_name)?;
        let new = self.change_in(new_parent, new_name)?;
        Self::together(&old, &new)?.rename(ctx, old.node.inode, old_name, new.node.inode, new_name, flags)
    }

    fn link(&self, ctx: Context, inode: u64, new_parent: u64, new_name: &CStr) -> io::Result<Entry> {
        let file = self.at(inode)?;
        let parent = self.change_in(new_parent, new_name)?;
        let linked = Self::together(&file, &parent)?.link(ctx, file.node.inode, parent.node.inode, new_name);
        linked.map(|entry| parent.entry(entry))
    }

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.refuse_ioctls(flags, FILE_DATA)?;
        let at = self.at(inode)?;
        let flags = flags_within(OPEN_FLAGS, flags);
        let (handle, options) = at.fs.open(ctx, at.node.inode, kill_priv, flags)?;
        Ok((handle, skip_flush(&at, flags, options)))
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let at = self.change_in(parent, name)?;
        let flags = flags_within(CREATE_FLAGS, flags);
        let made = at.fs.create(ctx, at.node.inode, name, mode, kill_priv, flags, umask, extensions);
        made.map(|(entry, handle, options)| (at.entry(entry), handle, skip_flush(&at, flags, options)))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        to: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let at = self.at(inode)?;
        at.fs.read(ctx, at.node.inode, handle, to, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let at = self.at(inode)?;
        at.fs.write(ctx, at.node.inode, handle, from, size, offset, lock_owner, delayed, kill_priv, flags)
    }

    fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        let at = self.at(inode)?;
        at.fs.flush(ctx, at.node.inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let at = self.at(inode)?;
        at.fs.fsync(ctx, at.node.inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let at = self.at(inode)?;
        at.fs.fallocate(ctx, at.node.inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let at = self.at(inode)?;
        at.fs.release(ctx, at.node.inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
        let at = self.at(inode)?;
        at.fs.statfs(ctx, at.node.inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        let at = self.change(inode)?;
        at.fs.setxattr(ctx, at.node.inode, name, value, flags, extra)
    }

    fn getxattr(&self, ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let at = self.at(inode)?;
        at.fs.getxattr(ctx, at.node.inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let at = self.at(inode)?;
        at.fs.listxattr(ctx, at.node.inode, size)
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        let at = self.change(inode)?;
        at.fs.removexattr(ctx, at.node.inode, name)
    }

    fn opendir(&self, ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.refuse_ioctls(flags, FOLDER_DATA)?;
        let at = self.at(inode)?;
        at.fs.opendir(ctx, at.node.inode, flags_within(OPEN_FLAGS, flags))
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        let at = self.at(inode)?;
        at.fs.readdir(ctx, at.node.inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let at = self.at(inode)?;
        at.fs.fsyncdir(ctx, at.node.inode, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        let at = self.at(inode)?;
        at.fs.releasedir(ctx, at.node.inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()> {
        let at = self.at(inode)?;
        at.fs.access(ctx, at.node.inode, mask)
    }

    fn lseek(&self, ctx: Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let at = self.at(inode)?;
        at.fs.lseek(ctx, at.node.inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: u64,
        offset_in: u64,
        inode_out: u64,
        handle_out: u64,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let (from, to) = (self.at(inode_in)?, self.at(inode_out)?);
        let (inode_in, inode_out) = (from.node.inode, to.node.inode);
        Self::together(&from, &to)?
            .copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        let at = self.at(inode)?;
        if at.node.is_share_root() { self.sync_all() } else { at.fs.syncfs(ctx, at.node.inode) }
    }
}

/// The daemon's state is not carried from host to host.
impl SerializableFileSystem for ShareFs {}
