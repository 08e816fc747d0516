//! Which node ID stands for which file: the inode table.
//!
//! ```text
//!   node ID ──> Node: O_PATH descriptor, inode number as first seen   ──┐ refs: how often the host kernel
//!   (device, inode number, mount) ──> node IDs                          ┘       was told of it and has not forgotten
//! ```
//!
//! Invariants:
//! 1. A node ID is never used twice, so the host's memory of a file cannot come to mean another.
//! 2. A node is reached through its descriptor only; no path is kept.
//! 3. One file has one node, or else the host would cache it twice. Overlay can show two files under one inode
//!    number (hard links in a lower layer, which a copy-up separates), so where names are several, numbers are
//!    not believed: inotify tells whether two descriptors are one inode. And a copy-up that separates a file from
//!    its other names gives it another number: while that may happen the node is found by its inode, and then under
//!    both numbers. A copy-up can take minutes: nobody waits for it to look for a node.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags};
use rustix::io::{Errno, Result};

use super::lend::Lent;
use crate::export::stat::attr;
use crate::export::wire::abi::{Attr, ROOT_ID};

/// The mask of a watch that tells two inodes apart and hardly ever has an event.
const QUIET: WatchFlags = WatchFlags::MOVE_SELF;

/// A file that the host knows.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: u64,
    path_only: OwnedFd,
    key: Key,
    /// What the host sees as the inode number. Overlay may change its own at copy-up.
    pub(super) ino: u64,
    kind: u32,
    /// Whether a copy-up may give it another number.
    several: bool,
    /// Whether it is known to have no capabilities, and so to keep none from being written to. Held by who asks
    /// whether it has, and by who gives it some.
    pub(super) bare: Mutex<bool>,
    /// Whether the host changes it.
    pub(super) lent: Lent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: (u32, u32),
    ino: u64,
    mount: u64,
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    /// How often the host was told of it and has not forgotten.
    refs: u64,
    /// What it is found by as well, since it was copied up.
    renumbered: Option<Key>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, Vec<u64>>,
    /// What may have got another number by now; as often as somebody changes it.
    parting: Vec<u64>,
    last: u64,
}

/// The inode table.
#[derive(Debug)]
pub(super) struct Nodes {
    table: RwLock<Table>,
    /// For one at a time: whoever looks takes the other's watch away.
    twins: Mutex<OwnedFd>,
    /// Counts the times that a file was looked at before it was forgotten.
    refreshed: AtomicU64,
}

/// While it lives, files may get other numbers. When it ends they are found by what they have got.
#[must_use]
pub(super) struct Renumbering<'a> {
    nodes: &'a Nodes,
    files: Vec<Arc<Node>>,
}

impl Drop for Renumbering<'_> {
    fn drop(&mut self) {
        self.files.iter().for_each(|node| self.nodes.renumber(node));
    }
}

/// What a descriptor's file is like.
pub(super) fn stat(file: impl AsFd) -> Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, wanted)
}

/// The same, from whose disk it lies on.
pub(super) fn stat_now(file: impl AsFd) -> Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, wanted)
}

/// The path that leads to a descriptor's file and to no other, whatever its names are.
pub(super) fn magic(file: impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}

impl Node {
    pub(super) fn attr(&self) -> Result<Attr> {
        let st = self.lent.with_attributes(stat, stat_now, &self.path_only)?;
        Ok(attr(&st, self.ino))
    }

    /// The attributes that this kernel remembers.
    pub(super) fn remembered(&self) -> Result<Attr> {
        Ok(attr(&stat(&self.path_only)?, self.ino))
    }

    /// How many names it has, as far as this kernel remembers.
    pub(super) fn names(&self) -> Result<u32> {
        let remembered = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        Ok(rustix::fs::statx(&self.path_only, c"", remembered, StatxFlags::NLINK)?.stx_nlink)
    }

    /// Opens the file itself. Devices, fifos and sockets stay shut: opening has effects there.
    pub(super) fn open(&self, flags: OFlags) -> Result<OwnedFd> {
        if !matches!(self.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(Errno::NXIO);
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::open(magic(self), flags, Mode::empty())
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.path_only.as_fd()
    }
}

impl Nodes {
    /// A table with `root` in it.
    pub(super) fn new(root: OwnedFd) -> Result<Self> {
        let mut table = Table { last: ROOT_ID - 1, ..Table::default() };
        let st = stat(&root)?;
        table.insert(root, &st);
        Ok(Self {
            table: RwLock::new(table),
            twins: Mutex::new(inotify::init(CreateFlags::CLOEXEC)?),
            refreshed: AtomicU64::new(0),
        })
    }

    pub(super) fn find(&self, id: u64) -> Result<Arc<Node>> {
        self.read().by_id.get(&id).map(|known| Arc::clone(&known.node)).ok_or(Errno::STALE)
    }

    /// To be held by who changes these files, if that may give one of them another number.
    pub(super) fn renumbering(&self, files: impl IntoIterator<Item = Arc<Node>>) -> Renumbering<'_> {
        let files: Vec<_> = files.into_iter().filter(|node| node.several).collect();
        if !files.is_empty() {
            self.write().parting.extend(files.iter().map(|node| node.id));
        }
        Renumbering { nodes: self, files }
    }

    fn renumber(&self, node: &Node) {
        // If it fails, so did the change, or the next look at the file will.
        let key = stat(node).map_or(node.key, |st| Key::of(&st));
        let mut table = self.write();
        // At once, so that whoever looks finds it in one way or the other.
        table.parted(node.id);
        if key != node.key {
            table.renumber(node.id, key);
        }
    }

    /// The file that a name stands for, if the host knows it and it has other names.
    pub(super) fn one_of_several(&self, folder: &Node, name: &CStr) -> Option<Arc<Node>> {
        let remembered = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
        let st =
            rustix::fs::statx(folder, name, remembered, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID).ok()?;
        if st.stx_nlink < 2 || kind(&st) == libc::S_IFDIR {
            return None;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(folder, name, flags, Mode::empty()).ok()?;
        let table = self.read();
        let id = self.known(&table, &file, &st).ok()??;
        table.by_id.get(&id).map(|known| Arc::clone(&known.node))
    }

    /// The node of a file that the host is about to be told of, and its attributes.
    pub(super) fn admit(&self, file: OwnedFd) -> Result<(Arc<Node>, Attr)> {
        let refreshed = self.refreshed.load(Ordering::Acquire);
        let st = stat(&file)?;
        let node = self.admit_stat(file, &st)?;
        // What was lent may have been looked at and forgotten since.
        let changed = self.refreshed.load(Ordering::Acquire) != refreshed;
        let told = if changed || node.lent.ever() { node.attr() } else { Ok(attr(&st, node.ino)) };
        // The host hears of it, or it was not told.
        let attr = told.inspect_err(|_| self.forget(node.id, 1))?;
        Ok((node, attr))
    }

    fn admit_stat(&self, file: OwnedFd, st: &Statx) -> Result<Arc<Node>> {
        let mut table = self.write();
        let known = self.known(&table, &file, st)?.and_then(|id| table.again(id));
        Ok(known.unwrap_or_else(|| table.insert(file, st)))
    }

    fn known(&self, table: &Table, file: &OwnedFd, st: &Statx) -> Result<Option<u64>> {
        let candidates = table.by_key.get(&Key::of(st)).map_or(&[][..], Vec::as_slice);
        let is_folder = kind(st) == libc::S_IFDIR;
        if is_folder || (st.stx_nlink < 2 && !candidates.is_empty()) {
            return Ok(candidates.first().copied());
        }
        for id in candidates.iter().chain(&table.parting) {
            if let Some(known) = table.by_id.get(id)
                && self.same(&known.node, file)?
            {
                return Ok(Some(*id));
            }
        }
        Ok(None)
    }

    /// Whether two descriptors with one inode number are one inode: then a watch on either is the same watch.
    fn same(&self, node: &Node, file: &OwnedFd) -> Result<bool> {
        let twins = self.twins.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = |path: String| inotify::add_watch(&*twins, path, QUIET);
        let one = watch(magic(node))?;
        let other = watch(magic(file));
        for wd in [Some(one), other.ok()].into_iter().flatten() {
            // The second removal finds nothing when the watches were one.
            let _ = inotify::remove_watch(&*twins, wd);
        }
        Ok(one == other?)
    }

    /// Tells the host of a node once more.
    pub(super) fn again(&self, node: &Node) -> Result<Attr> {
        let attr = node.attr()?;
        self.write().again(node.id).ok_or(Errno::STALE)?;
        Ok(attr)
    }

    /// The host forgot `count` of the times that it was told.
    pub(super) fn forget(&self, id: u64, count: u64) {
        self.refresh(id);
        // Closing the descriptor can take long: after the lock.
        let gone = self.write().forget(id, count);
        drop(gone);
    }

    /// Learns what the host has done to a file that may be about to go, for who finds it next.
    fn refresh(&self, id: u64) {
        let Ok(node) = self.find(id) else { return };
        if node.lent.is_old() && node.names().is_ok_and(|names| names > 0) {
            // If it fails, it is the next one's error.
            let _ = node.attr();
            self.refreshed.fetch_add(1, Ordering::AcqRel);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.read().by_id.len()
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, path_only: OwnedFd, st: &Statx) -> Arc<Node> {
        self.last += 1;
        let (id, key) = (self.last, Key::of(st));
        let node = Arc::new(Node {
            id,
            path_only,
            key,
            ino: st.stx_ino,
            kind: kind(st),
            several: kind(st) != libc::S_IFDIR && st.stx_nlink > 1,
            bare: Mutex::default(),
            lent: Lent::default(),
        });
        self.by_id.insert(id, Known { node: Arc::clone(&node), refs: 1, renumbered: None });
        self.by_key.entry(key).or_default().push(id);
        node
    }

    fn again(&mut self, id: u64) -> Option<Arc<Node>> {
        let known = self.by_id.get_mut(&id)?;
        known.refs += 1;
        Some(Arc::clone(&known.node))
    }

    fn parted(&mut self, id: u64) {
        if let Some(place) = self.parting.iter().position(|other| *other == id) {
            self.parting.swap_remove(place);
        }
    }

    /// A file is copied up once: it has two numbers at most.
    fn renumber(&mut self, id: u64, key: Key) {
        let Some(known) = self.by_id.get_mut(&id).filter(|known| known.renumbered.is_none()) else { return };
        known.renumbered = Some(key);
        self.by_key.entry(key).or_default().push(id);
    }

    fn forget(&mut self, id: u64, count: u64) -> Option<Arc<Node>> {
        let known = self.by_id.get_mut(&id)?;
        known.refs = known.refs.saturating_sub(count);
        if known.refs > 0 || id == ROOT_ID {
            return None;
        }
        let gone = self.by_id.remove(&id)?;
        for key in std::iter::once(gone.node.key).chain(gone.renumbered) {
            self.drop_key(key, id);
        }
        Some(gone.node)
    }

    fn drop_key(&mut self, key: Key, id: u64) {
        if let Some(ids) = self.by_key.get_mut(&key) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_key.remove(&key);
            }
        }
    }
}

impl Key {
    fn of(st: &Statx) -> Self {
        Self { device: (st.stx_dev_major, st.stx_dev_minor), ino: st.stx_ino, mount: st.stx_mnt_id }
    }
}

fn kind(st: &Statx) -> u32 {
    u32::from(st.stx_mode) & libc::S_IFMT
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::fs::CWD;

    use super::*;

    fn path_only(path: &std::path::Path) -> OwnedFd {
        rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .unwrap()
    }

    #[test]
    fn a_node_lives_until_the_host_forgot_it_as_often_as_it_was_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let nodes = Nodes::new(path_only(dir.path())).unwrap();
        let admit = || nodes.admit(path_only(&dir.path().join("file"))).unwrap().0;
        let (first, second) = (admit(), admit());
        assert_eq!(first.id, second.id);
        nodes.forget(first.id, 1);
        assert!(nodes.find(first.id).is_ok());
        nodes.forget(first.id, 1);
        assert_eq!(nodes.find(first.id).unwrap_err(), Errno::STALE);
        assert_ne!(admit().id, first.id, "a node ID was used again");
    }

    #[test]
    fn one_of_several_is_found_by_many_at_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("one"), "").unwrap();
        fs::hard_link(dir.path().join("one"), dir.path().join("other")).unwrap();
        let nodes = Nodes::new(path_only(dir.path())).unwrap();
        let (file, _) = nodes.admit(path_only(&dir.path().join("one"))).unwrap();
        let root = nodes.find(ROOT_ID).unwrap();
        let find = || {
            let found = (0..2000).map(|_| nodes.one_of_several(&root, c"other"));
            assert!(found.into_iter().all(|found| found.is_some_and(|found| found.id == file.id)));
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(find))));
    }

    /// An overlay over `dir`, for this thread and those that it starts.
    fn overlay(dir: &std::path::Path) -> OwnedFd {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let at = |name: &str| dir.join(name).display().to_string();
        let options =
            format!("lowerdir={},upperdir={},workdir={},index=off", at("low"), at("up"), at("work"));
        let options = std::ffi::CString::new(options).unwrap();
        let merged = dir.join("merged");
        mount("overlay", &merged, "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
        path_only(&merged)
    }

    fn parts_without_anybody_waiting(dir: &std::path::Path) {
        let nodes = Nodes::new(overlay(dir)).unwrap();
        let admit = |name: &str| nodes.admit(path_only(&dir.join("merged").join(name))).unwrap();
        let (file, before) = admit("one");
        let renumbering = [nodes.renumbering([Arc::clone(&file)]), nodes.renumbering([Arc::clone(&file)])];
        assert_eq!(admit("one").0.id, file.id);
        rustix::fs::chmodat(CWD, magic(&*file), Mode::from(0o600), AtFlags::empty()).unwrap();
        assert_ne!(stat(&*file).unwrap().stx_ino, before.ino, "it was to get another number");
        for guard in renumbering {
            assert_eq!(admit("one").0.id, file.id);
            assert_ne!(admit("other").0.id, file.id);
            assert_ne!(admit("beside").0.id, file.id);
            drop(guard);
        }
        let (found, attr) = admit("one");
        assert_eq!((found.id, attr.ino), (file.id, before.ino));
        assert!(nodes.read().parting.is_empty());
    }

    #[test]
    fn a_file_that_is_parted_is_found_meanwhile_and_others_too() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        for name in ["low", "up", "work", "merged"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let low = dir.path().join("low");
        fs::write(low.join("one"), "").unwrap();
        fs::hard_link(low.join("one"), low.join("other")).unwrap();
        fs::write(low.join("beside"), "").unwrap();
        std::thread::scope(|scope| scope.spawn(|| parts_without_anybody_waiting(dir.path())).join()).unwrap();
    }

    #[test]
    fn hard_links_are_one_node_and_the_root_stays() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("one"), "").unwrap();
        let nodes = Nodes::new(path_only(dir.path())).unwrap();
        let admit = |name: &str| nodes.admit(path_only(&dir.path().join(name))).unwrap().0.id;
        let one = admit("one");
        fs::hard_link(dir.path().join("one"), dir.path().join("other")).unwrap();
        assert_eq!(admit("other"), one);
        assert_eq!(admit("one"), one);
        assert_eq!(nodes.len(), 2);
        nodes.forget(ROOT_ID, u64::MAX);
        assert!(nodes.find(ROOT_ID).is_ok());
    }
}
