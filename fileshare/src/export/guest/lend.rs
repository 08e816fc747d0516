//! Lending files of the upper folder to the host, which then reads and writes them where they lie.
//!
//! ```text
//!   OPEN to write, CREATE ──> handle, and a hint: where the file lies below the upper folder ──> lent
//!        the host writes it ── what this kernel remembers of it is old: attributes, contents, the file's end
//!   RELEASE of the last such handle ──> returned ── looked at once more ──> as any other file
//! ```
//!
//! This kernel's share remembers attributes and contents without limit, for nobody else changes them: so whoever is
//! told of a lent file's attributes, or works on it here after all, has them asked for anew.
//!
//! Invariants:
//! 1. A hint names the very file that was opened: no name is moved or removed while it is looked for.
//! 2. A node that was lent is old until it was looked at after the last handle was closed, and it is looked at
//!    before it is forgotten: who finds the file next sees what it is like.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::{Advice, AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Result;

use super::caller::Caller;
use super::entries::is_writable;
use super::handles::Handle;
use super::layers::{Layers, look, place};
use super::message::Answer;
use super::nodes::{Node, stat_now};
use super::server::Server;
use crate::export::wire::abi::flag;
use crate::export::wire::lent::UpperHint;

/// What the kernel shows behind the path of a file whose name is gone.
const GONE: &[u8] = b" (deleted)";

/// Whether this server lends.
#[derive(Debug, Default)]
pub(super) struct Lender {
    on: AtomicBool,
    /// Held shared while names are moved or removed.
    names: RwLock<()>,
}

/// How far a node is the host's to change, and what this kernel remembers of it old.
#[derive(Debug, Default)]
pub(super) struct Lent {
    handles: AtomicU32,
    /// How often it was given back.
    returned: AtomicU64,
    /// Of how many times this kernel knows what became of the attributes.
    attributes: AtomicU64,
    /// The same of the contents.
    contents: AtomicU64,
}

/// A file's place.
#[derive(Debug)]
pub(super) struct Place {
    ino: u64,
    shown: u64,
    path: PathBuf,
}

impl Lender {
    pub(super) fn agree(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }

    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// To be held by who moves or removes a name.
    pub(super) fn moving(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lent {
    pub(super) fn lend(&self) {
        self.handles.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn returned(&self) {
        // First that there is something to learn: who finds no handle finds that.
        self.returned.fetch_add(1, Ordering::AcqRel);
        self.handles.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether the host has, or ever had, the file.
    pub(super) fn ever(&self) -> bool {
        self.handles.load(Ordering::Acquire) > 0 || self.returned.load(Ordering::Acquire) > 0
    }

    /// Whether the attributes that this kernel remembers may be old.
    pub(super) fn is_old(&self) -> bool {
        self.is_behind(&self.attributes)
    }

    /// Looks at the file by `now` if what is remembered may be old.
    pub(super) fn with_attributes<'a>(
        &self,
        remembered: fn(&'a OwnedFd) -> Result<Statx>,
        now: fn(&'a OwnedFd) -> Result<Statx>,
        file: &'a OwnedFd,
    ) -> Result<Statx> {
        if self.is_old() { self.catch_up(&self.attributes, || now(file)) } else { remembered(file) }
    }

    /// Has the contents forgotten if they may be old.
    pub(super) fn with_contents(&self, forget: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.is_behind(&self.contents) { self.catch_up(&self.contents, forget) } else { Ok(()) }
    }

    fn is_behind(&self, known: &AtomicU64) -> bool {
        self.handles.load(Ordering::Acquire) > 0
            || self.returned.load(Ordering::Acquire) > known.load(Ordering::Acquire)
    }

    /// Others that come meanwhile look, too: only what was looked at to the end is known.
    fn catch_up<T>(&self, known: &AtomicU64, look: impl FnOnce() -> Result<T>) -> Result<T> {
        let returned = self.returned.load(Ordering::Acquire);
        let seen = look()?;
        known.fetch_max(returned, Ordering::AcqRel);
        Ok(seen)
    }
}

/// Has this kernel forget what it remembers of a file's contents, and learn where it ends.
pub(super) fn forget_contents(file: impl AsFd) -> Result<()> {
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    stat_now(&file).map(drop)
}

impl Layers {
    /// Finds the upper file behind `node`, below the folder at `root`. Names must stand still.
    fn in_upper(&self, root: &OwnedFd, node: &Node) -> Option<Place> {
        let upper = self.upper.as_ref()?;
        let path = place(root, node).filter(|path| !path.as_os_str().as_bytes().ends_with(GONE))?;
        let (merged, found) = (what(node).ok()?, what(look(upper, &path).ok()?).ok()?);
        let regular = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFREG;
        // Names of a file that had several when it was copied up are counted by the overlay: the upper file has one
        // more, in the overlay's index.
        let counted = found.stx_ino != node.ino && found.stx_nlink > 1;
        let same = found.stx_mode == merged.stx_mode && found.stx_nlink == merged.stx_nlink;
        (regular && same && found.stx_nlink > 0 && !counted).then_some(Place {
            ino: found.stx_ino,
            shown: node.ino,
            path,
        })
    }
}

/// What of a file this kernel always remembers.
fn what(file: impl AsFd) -> Result<Statx> {
    let wanted = StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::NLINK | StatxFlags::INO;
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, wanted)
}

impl Place {
    pub(super) fn put(&self, answer: &mut Answer) {
        let path = self.path.as_os_str().as_bytes();
        UpperHint { ino: self.ino, shown: self.shown, path }.put(answer);
    }
}

impl Server {
    /// Where the host finds a file, if it lies in the upper folder and can be lent.
    pub(super) fn place(&self, node: &Node) -> Option<Place> {
        let layers = self.layers.as_ref().filter(|_| self.lender.is_on())?;
        let _still = self.lender.names.write().unwrap_or_else(PoisonError::into_inner);
        layers.in_upper(&self.root, node)
    }

    /// Opens a file to write, for the host to do that if it lies in the upper folder, or does so then.
    pub(super) fn open_to_lend(
        &self,
        caller: &Caller,
        node: &Arc<Node>,
        (flags, open_flags): (u32, u32),
    ) -> Result<(u64, Option<Place>)> {
        let asked = OFlags::from_bits_retain(flags);
        let (lendable, how) = (open_flags & flag::OPEN_NOT_LENT == 0, self.passed(asked));
        if lendable
            && !asked.contains(OFlags::TRUNC)
            && let Some(place) = self.place(node)
        {
            return Ok((self.handles.add(Handle::lent(Arc::clone(node), None, how)), Some(place)));
        }
        let file = self.open_file(caller, node, (asked, open_flags))?;
        match self.place(node).filter(|_| lendable) {
            Some(place) => {
                Ok((self.handles.add(Handle::lent(Arc::clone(node), Some(file), how)), Some(place)))
            }
            None => {
                // What was lent may have been forgotten, and found again.
                forget_contents(&file)?;
                Ok((self.handles.add(Handle::new(Arc::clone(node), file, true)), None))
            }
        }
    }

    /// Makes a file that the host will write: without opening it here.
    pub(super) fn make_to_lend(
        &self,
        caller: &Caller,
        parent: &Node,
        name: &CStr,
        (asked, mode, umask): (OFlags, u32, u32),
        answer: &mut Answer,
    ) -> Result<()> {
        {
            let _acting = caller.act(umask)?;
            let mode = Mode::from_raw_mode(mode & 0o7777);
            self.room.with(|| rustix::fs::mknodat(parent, name, FileType::RegularFile, mode, 0))?;
        }
        // The host's kernel holds the folder: nobody moves the name before this is answered.
        let (node, attr) = self.look(parent, name)?;
        let how = self.passed(asked);
        let place = self.place(&node);
        let handle = match &place {
            Some(_) => Ok(Handle::lent(Arc::clone(&node), None, how)),
            None => {
                let file = self.room.with(|| node.open(how));
                file.map(|file| Handle::new(Arc::clone(&node), file, is_writable(asked)))
            }
        };
        let handle = handle.inspect_err(|_| self.nodes.forget(node.id, 1))?;
        answer.entry(node.id, attr);
        answer.open(self.handles.add(handle));
        place.into_iter().for_each(|place| place.put(answer));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lent_is_old_until_it_was_looked_at_to_the_end() {
        let lent = Lent::default();
        assert!(!lent.is_old() && !lent.ever());
        lent.lend();
        let look = || lent.catch_up(&lent.attributes, || Ok(()));
        look().unwrap();
        assert!(lent.is_old() && lent.ever(), "the host may still write");
        lent.returned();
        assert!(lent.is_old());
        let meanwhile = || {
            assert!(lent.is_old(), "another looks, but has not seen it yet");
            Ok(())
        };
        lent.catch_up(&lent.attributes, meanwhile).unwrap();
        assert!(!lent.is_old());
        assert!(lent.is_behind(&lent.contents), "only the attributes were looked at");
        let failed: Result<()> = lent.with_contents(|| Err(rustix::io::Errno::IO));
        assert!(failed.is_err() && lent.is_behind(&lent.contents));
        lent.with_contents(|| Ok(())).unwrap();
        lent.with_contents(|| panic!("known already")).unwrap();
    }

    #[test]
    fn what_is_lent_again_while_it_is_looked_at_stays_old() {
        let lent = Lent::default();
        lent.lend();
        lent.returned();
        let again = || {
            lent.lend();
            lent.returned();
            Ok(())
        };
        lent.catch_up(&lent.attributes, again).unwrap();
        assert!(lent.is_old());
    }
}
