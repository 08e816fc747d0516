//! The file system that the guest mounts: up to three passthrough file systems under one root.
//!
//! ```text
//!   FUSE root ── lower/N, root   ── share    passthrough of /share    remembers without limit
//!             ├─ upper, work     ── top      passthrough of /top      likewise; its root is hidden
//!             └─ vol/N           ── volumes  passthrough of /vol      asks the host each time
//! ```
//!
//! [`ShareFs`] only sorts requests: it finds the passthrough that a node belongs to (`names`), refuses what no
//! guest has a right to ask, and lets [`PassthroughFs`] do the work.
//!
//! Invariants, whatever the guest sends:
//! 1. Names are single components; node IDs are ones that some lookup returned. So upper, work, each layer and
//!    each volume is a closed world.
//! 2. The roots do not change: nothing is made, removed, renamed or re-attributed in them.
//! 3. Links, renames and copies stay within one passthrough; others get EXDEV, which every caller handles.
//! 4. Special files are never opened: [`PassthroughFs`] opens only what it saw to be a file or folder, through
//!    the very descriptor that it looked at.

mod config;
mod names;
mod owner;
mod requests;

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use virtiofsd::filesystem::{Context, Entry, FileSystem, ROOT_ID};
use virtiofsd::fuse;
use virtiofsd::passthrough::PassthroughFs;

use config::{Cache, FOREVER, passthrough};
pub use config::{Limits, Places, TopPlaces};
use names::{Area, Node, component, node_id};

use super::UsedBy;

/// The share root, served.
pub struct ShareFs {
    used_by: UsedBy,
    share: PassthroughFs,
    top: Option<Top>,
    volumes: Option<PassthroughFs>,
    writable: Vec<std::fs::File>,
}

struct Top {
    fs: PassthroughFs,
    upper: CString,
    work: CString,
}

/// One request's target: which passthrough, and which inode in it.
struct At<'a> {
    fs: &'a PassthroughFs,
    node: Node,
}

impl ShareFs {
    /// Opens the roots at `places`.
    ///
    /// # Errors
    /// A place cannot be opened, or procfs is missing.
    pub fn new(places: &Places, limits: Limits) -> io::Result<Self> {
        let Limits { used_by, guest_fds, one_filesystem, proc_self_fd, writable } = limits;
        let open = |root: &Path, cache, announce| {
            PassthroughFs::new(passthrough(root, cache, announce, guest_fds, proc_self_fd.as_ref())?)
        };
        let share = open(&places.share, Cache::Keep, !one_filesystem)?;
        let top = match &places.top {
            None => None,
            Some(top) => Some(Top {
                // Upper and work must look to the guest like parts of one mount, so nothing is announced.
                fs: open(&top.parent, contents(used_by), false)?,
                upper: path_name(&top.upper)?,
                work: path_name(&top.work)?,
            }),
        };
        let volumes = match &places.volumes {
            None => None,
            Some(root) => Some(open(root, Cache::Ask, true)?),
        };
        Ok(Self { used_by, share, top, volumes, writable })
    }

    fn area(&self, area: Area) -> io::Result<&PassthroughFs> {
        let found = match area {
            Area::Share => Some(&self.share),
            Area::Top => self.top.as_ref().map(|top| &top.fs),
            Area::Volumes => self.volumes.as_ref(),
        };
        found.ok_or_else(|| errno(libc::EBADF))
    }

    fn areas(&self) -> impl Iterator<Item = &PassthroughFs> {
        Area::ALL.into_iter().filter_map(|area| self.area(area).ok())
    }

    /// Finds what a node ID stands for.
    fn at(&self, id: u64) -> io::Result<At<'_>> {
        let node = Node::parse(id)?;
        Ok(At { fs: self.area(node.area)?, node })
    }

    /// Finds a node for a request that changes it.
    fn change(&self, id: u64) -> io::Result<At<'_>> {
        let at = self.at(id)?;
        if at.node.is_root() { Err(errno(libc::EROFS)) } else { Ok(at) }
    }

    /// Finds a folder for a request that changes `name` in it.
    fn change_in(&self, parent: u64, name: &CStr) -> io::Result<At<'_>> {
        component(name)?;
        self.change(parent)
    }

    /// The folders of the FUSE root that are served from elsewhere.
    fn lookup_grafted(&self, ctx: Context, name: &CStr) -> Option<io::Result<Entry>> {
        match (name.to_bytes(), &self.top, &self.volumes) {
            (b"upper", Some(top), _) => Some(lookup_trusted(ctx, top, &top.upper)),
            (b"work", Some(top), _) => Some(lookup_trusted(ctx, top, &top.work)),
            (b"vol", _, Some(volumes)) => Some(root_entry(ctx, Area::Volumes, volumes)),
            _ => None,
        }
    }

    /// The guest syncs the file system that it mounted; the writable ones are what it means.
    fn sync_all(&self) -> io::Result<()> {
        for file in &self.writable {
            rustix::fs::syncfs(file)?;
        }
        Ok(())
    }
}

impl At<'_> {
    /// Turns the passthrough's answer into one with the guest's node ID.
    fn entry(&self, entry: Entry) -> Entry {
        of_area(self.node.area, entry)
    }

    /// Whether the guest may remember that a name does not exist.
    fn remembers(&self) -> bool {
        self.node.area != Area::Volumes
    }
}

/// How upper and work are remembered.
fn contents(used_by: UsedBy) -> Cache {
    match used_by {
        UsedBy::Container => Cache::Keep,
        UsedBy::Union => Cache::KeepNames,
    }
}

fn of_area(area: Area, mut entry: Entry) -> Entry {
    entry.inode = node_id(area, entry.inode);
    entry
}

/// "No such name", to be remembered.
fn absent() -> Entry {
    let attr = fuse::Attr::default();
    Entry { inode: 0, generation: 0, attr, attr_timeout: FOREVER, entry_timeout: FOREVER }
}

/// Looks up a path that the host chose, below the hidden folder.
fn lookup_trusted(ctx: Context, top: &Top, path: &CStr) -> io::Result<Entry> {
    Ok(of_area(Area::Top, top.fs.lookup(ctx, ROOT_ID, path)?))
}

fn root_entry(ctx: Context, area: Area, fs: &PassthroughFs) -> io::Result<Entry> {
    let (attr, _) = fs.getattr(ctx, ROOT_ID, None)?;
    let inode = node_id(area, ROOT_ID);
    Ok(Entry { inode, generation: 0, attr, attr_timeout: FOREVER, entry_timeout: FOREVER })
}

fn path_name(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
