//! Builds the share root out of bind mounts, and makes it the only thing that the process can reach.
//!
//! ```text
//!   /                 tmpfs, read-only once built
//!   ├── share/        what the guest mounts (FUSE root)
//!   │   ├── lower/N   bind of a layer                          ro
//!   │   ├── root      bind of a plain root folder              rw or ro
//!   │   ├── upper     empty: stands for top/... in listings
//!   │   ├── work      likewise
//!   │   └── vol       likewise for /vol
//!   ├── top           bind of the folder that holds upper and work: one mount, so renames between them work
//!   ├── vol/N         bind of a volume                         rw or ro
//!   └── proc          mount point used while entering
//! ```
//!
//! Every mount is nodev, nosuid, noexec and nosymfollow: the server opens no device, runs nothing, and leaves
//! symlinks to the guest; those flags make it so even if the server is taken over. None of them shows in the
//! guest.
//!
//! Invariant: the caller's mount namespace is private to it (see `sandbox`). Until [`ShareRoot::enter`]
//! the host's mounts are still there; after it, only the tree above.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use libc::{
    MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY,
};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::sources::{Below, FileId, OverlaySource, Source, Sources, TopSource, VolumeSource};
use crate::folder::clone_tree;
use crate::sys::{Reach, mount_setattr};

/// Where the guest's view begins.
pub const SHARE: &str = "/share";
/// Where the volumes are mounted.
pub const VOLUMES: &str = "/vol";
/// Where the folder that holds upper and work is mounted.
pub const TOP: &str = "/top";

/// Host folder that the new root is mounted over until it is entered; it exists wherever procfs does.
const STAGE: &str = "/proc";

const HARDENED: u64 = MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSYMFOLLOW;

/// Room for the directory entries and nothing else.
const ROOT_SIZE: &str = "1m";

/// The share root could not be built or entered.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A source could not be mounted.
    #[error("cannot bind-mount {path}")]
    Bind {
        /// The source.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// Something is mounted between parent and folder, so that a rename out of it would fail.
    #[error(
        "{path} is not on the same mount as {parent}: an overlay renames between upper and work, which works \
         within one mount only"
    )]
    OtherMount {
        /// Upper or work.
        path: PathBuf,
        /// Their common folder.
        parent: PathBuf,
    },
    /// A step of our own.
    #[error("cannot {step}")]
    Step {
        /// What failed.
        step: &'static str,
        /// The cause.
        #[source]
        cause: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> MountError {
    move |cause| MountError::Step { step, cause: cause.into() }
}

/// A share root that is built but not yet entered.
#[derive(Debug)]
pub struct ShareRoot {
    root: OwnedFd,
    /// Path of the upper folder below [`TOP`], when there is one.
    pub upper: Option<PathBuf>,
    /// Path of the work folder below [`TOP`], when there is one.
    pub work: Option<PathBuf>,
    /// Whether any volume is mounted.
    pub has_volumes: bool,
    /// An open file or folder in each file system that the guest may write, for syncfs.
    pub writable: Vec<File>,
}

impl ShareRoot {
    /// Mounts a new root over a folder of the host, with everything that `sources` hold in it.
    ///
    /// # Errors
    /// The source that could not be mounted, or the step that failed.
    pub fn build(sources: &Sources) -> Result<Self, MountError> {
        // Taken before the new root covers a folder of the host: a volume with that folder in it would else
        // show the new root, and the hidden folder around upper and work with it.
        let volumes = sources.volumes.iter().map(Tree::of_volume).collect::<Result<Vec<_>, _>>()?;
        let root = mount_root().map_err(step("mount the share root"))?;
        for dir in ["share", "share/lower", "vol", "top", "proc"] {
            make_dir(&root, dir)?;
        }
        let mut built = Self {
            root,
            upper: None,
            work: None,
            has_volumes: !sources.volumes.is_empty(),
            writable: Vec::new(),
        };
        for (index, lower) in sources.lowers.iter().enumerate() {
            built.bind(&format!("share/lower/{index}"), &Tree::of(lower, Access::ReadOnly, Reach::One)?)?;
        }
        match &sources.top {
            TopSource::None => {}
            TopSource::Overlay(overlay) => built.mount_overlay(overlay)?,
            TopSource::Folder { source, read_only } => {
                built.bind("share/root", &Tree::of(source, Access::read_only(*read_only), Reach::One)?)?;
            }
        }
        for (index, volume) in volumes.iter().enumerate() {
            built.bind(&format!("vol/{index}"), volume)?;
        }
        if built.has_volumes {
            make_dir(&built.root, "share/vol")?;
        }
        Ok(built)
    }

    fn mount_overlay(&mut self, overlay: &OverlaySource) -> Result<(), MountError> {
        self.bind("top", &Tree::of(&overlay.parent, Access::Write, Reach::One)?)?;
        for (below, name) in [(&overlay.upper, "share/upper"), (&overlay.work, "share/work")] {
            self.check_one_mount(&overlay.parent, below)?;
            make_dir(&self.root, name)?;
        }
        self.upper = Some(overlay.upper.relative.clone());
        self.work = Some(overlay.work.relative.clone());
        Ok(())
    }

    /// A mount that covers part of the path on the host is not there in the bind of the parent: what is found
    /// below it then is another folder.
    fn check_one_mount(&self, parent: &Source, below: &Below) -> Result<(), MountError> {
        let other =
            || MountError::OtherMount { path: below.source.path.clone(), parent: parent.path.clone() };
        let top = open_beneath(&self.root, Path::new("top")).map_err(step("open the share root"))?;
        let found = open_beneath(&top, &below.relative).map_err(|_| other())?;
        let id = FileId::of(&File::from(found)).map_err(step("look at the share root"))?;
        if id == below.source.id { Ok(()) } else { Err(other()) }
    }

    fn bind(&mut self, target: &str, tree: &Tree<'_>) -> Result<(), MountError> {
        if tree.source.is_dir {
            make_dir_if_missing(&self.root, target)?;
        } else {
            make_file(&self.root, target)?;
        }
        attach(&tree.mount, &self.root, target).map_err(|cause| tree.source.cannot_bind(cause))?;
        if tree.access == Access::Write {
            self.keep_for_sync(target).map_err(|cause| tree.source.cannot_bind(cause))?;
        }
        Ok(())
    }

    fn keep_for_sync(&mut self, target: &str) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = File::from(rustix::fs::openat(&self.root, target, flags, Mode::empty())?);
        let dev = FileId::of(&file)?.dev;
        let known = self.writable.iter().any(|file| FileId::of(file).is_ok_and(|id| id.dev == dev));
        if !known {
            self.writable.push(file);
        }
        Ok(())
    }

    /// Makes the share root the process's root, drops every other mount from the namespace and makes the root
    /// itself read-only. Returns a descriptor of the process's own `/proc/self/fd`, the only part of procfs
    /// that stays reachable.
    ///
    /// # Errors
    /// The step that failed; the process is of no use then.
    pub fn enter(&self) -> Result<File, MountError> {
        rustix::process::fchdir(&self.root).map_err(step("enter the share root"))?;
        rustix::process::pivot_root(".", ".").map_err(step("pivot into the share root"))?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(step("unmount the host's root"))?;
        rustix::process::chdir("/").map_err(step("enter the share root"))?;
        let proc_self_fd = own_descriptors().map_err(step("open /proc/self/fd"))?;
        mount_setattr(&self.root, Reach::One, HARDENED | MOUNT_ATTR_RDONLY, 0)
            .map_err(step("make the share root read-only"))?;
        Ok(proc_self_fd)
    }
}

impl AsFd for ShareRoot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// A copy of what is mounted at a source, hardened and not attached anywhere yet.
struct Tree<'a> {
    source: &'a Source,
    mount: OwnedFd,
    access: Access,
}

impl<'a> Tree<'a> {
    fn of(source: &'a Source, access: Access, reach: Reach) -> Result<Self, MountError> {
        let mount = clone_tree(source, reach).map_err(|cause| source.cannot_bind(cause))?;
        mount_setattr(&mount, reach, HARDENED | access.flag(), 0)
            .map_err(|cause| source.cannot_bind(cause))?;
        Ok(Self { source, mount, access })
    }

    fn of_volume(volume: &'a VolumeSource) -> Result<Self, MountError> {
        let reach = if volume.recursive { Reach::All } else { Reach::One };
        Self::of(&volume.source, Access::read_only(volume.read_only), reach)
    }
}

impl Source {
    fn cannot_bind(&self, cause: io::Error) -> MountError {
        MountError::Bind { path: self.path.clone(), cause }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Write,
    ReadOnly,
}

impl Access {
    fn read_only(read_only: bool) -> Self {
        if read_only { Self::ReadOnly } else { Self::Write }
    }

    fn flag(self) -> u64 {
        match self {
            Self::Write => 0,
            Self::ReadOnly => MOUNT_ATTR_RDONLY,
        }
    }
}

fn mount_root() -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    rustix::mount::fsconfig_set_string(&context, "size", ROOT_SIZE)?;
    rustix::mount::fsconfig_create(&context)?;
    let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    attach(&root, CWD, STAGE)?;
    Ok(root)
}

/// A procfs of this process's PID namespace, cut down to `self/fd`: its root is that folder, so `..` leads
/// nowhere, and the mount is in no namespace.
fn own_descriptors() -> io::Result<File> {
    let context = rustix::mount::fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let proc = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    attach(&proc, CWD, "/proc")?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, "/proc/self/fd", flags)?;
    rustix::mount::unmount("/proc", UnmountFlags::DETACH)?;
    Ok(File::from(tree))
}

fn attach(tree: impl AsFd, root: impl AsFd, target: &str) -> io::Result<()> {
    Ok(rustix::mount::move_mount(tree, "", root, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn open_beneath(dir: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(dir, path, flags, Mode::empty(), within)?)
}

fn make_dir(root: impl AsFd, path: &str) -> Result<(), MountError> {
    rustix::fs::mkdirat(root, path, Mode::from_raw_mode(0o755)).map_err(step("fill the share root"))
}

fn make_dir_if_missing(root: impl AsFd, path: &str) -> Result<(), MountError> {
    match make_dir(root, path) {
        Err(MountError::Step { cause, .. }) if cause.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn make_file(root: impl AsFd, path: &str) -> Result<(), MountError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(root, path, flags, Mode::from_raw_mode(0o644))
        .map(drop)
        .map_err(step("fill the share root"))
}
