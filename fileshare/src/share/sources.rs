//! Opens and checks everything that a spec names, in the host's view, before anything is mounted.
//!
//! Invariant: a [`Sources`] holds open descriptors, so that what was checked is what gets mounted, whatever
//! happens to the paths meanwhile. Only folders and regular files pass. The paths of a union were checked before, and
//! had no symbolic links then: one that has come since is refused.
//!
//! An overlay renames between `upper` and `work`, which the kernel allows within one mount only. So both are
//! reached through one bind mount of their deepest common folder:
//!
//! ```text
//!   /snapshots/7          parent: bound once, hidden from the guest
//!   ├── fs                upper
//!   └── work              work
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, StatVfsMountFlags};

use super::spec::{ShareSpec, Top, UsedBy};
use crate::folder;

/// An extended attribute that any overlay asks its upper folder for.
const OVERLAY_XATTR: &str = "trusted.overlay.opaque";

/// A named path cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Does not exist or may not be read.
    #[error("cannot open {what} {path}")]
    Open {
        /// What the path is for.
        what: What,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// A file where a folder is needed, or a device, fifo or socket.
    #[error("{what} {path} is a {found}; only {wanted} can be shared here")]
    Type {
        /// What the path is for.
        what: What,
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
    /// Upper and work on two file systems.
    #[error("upper {upper} and work {work} are on different file systems: an overlay needs both on one")]
    TwoFilesystems {
        /// The upper folder.
        upper: PathBuf,
        /// The work folder.
        work: PathBuf,
    },
    /// One of upper and work contains the other.
    #[error("upper {upper} and work {work} must be separate folders, neither inside the other")]
    Nested {
        /// The upper folder.
        upper: PathBuf,
        /// The work folder.
        work: PathBuf,
    },
    /// Their only common folder is `/`.
    #[error(
        "upper {upper} and work {work} have no folder in common but /, and sharing that would put the whole \
         host within the daemon's reach: put both below one folder"
    )]
    CommonRoot {
        /// The upper folder.
        upper: PathBuf,
        /// The work folder.
        work: PathBuf,
    },
    /// The upper's file system takes no writes.
    #[error("{what} {path} is on a read-only file system")]
    ReadOnly {
        /// What the path is for.
        what: What,
        /// The path.
        path: PathBuf,
    },
    /// The upper's file system cannot hold what an overlay stores.
    #[error(
        "upper {path} is on a file system without trusted extended attributes, which an overlay needs; \
         ext4, xfs, btrfs and tmpfs have them"
    )]
    NoXattrs {
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
}

/// What a path is for, as messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// `lower/N`.
    Lower,
    /// `upper`.
    Upper,
    /// `work`.
    Work,
    /// The folder that holds upper and work.
    Parent,
    /// `root`.
    Root,
    /// `vol/N`.
    Volume,
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Lower => "lower layer",
            Self::Upper => "upper folder",
            Self::Work => "work folder",
            Self::Parent => "folder of upper and work",
            Self::Root => "root folder",
            Self::Volume => "volume",
        })
    }
}

/// One opened folder or regular file.
#[derive(Debug)]
pub struct Source {
    /// For messages.
    pub path: PathBuf,
    /// Whether it is a folder.
    pub is_dir: bool,
    /// The host's device and inode number.
    pub id: FileId,
    file: File,
}

/// A file's identity on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// The file system's device number.
    pub dev: u64,
    /// The inode number in it.
    pub ino: u64,
}

impl FileId {
    /// The identity of an open file.
    ///
    /// # Errors
    /// As fstat(2) does.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { dev: meta.dev(), ino: meta.ino() })
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The opened top of a share.
#[derive(Debug)]
pub enum TopSource {
    /// Nothing.
    None,
    /// An overlay's upper and work.
    Overlay(OverlaySource),
    /// A plain folder.
    Folder {
        /// The folder.
        source: Source,
        /// Refuse writes.
        read_only: bool,
    },
}

/// Upper and work below the one folder that gets mounted.
#[derive(Debug)]
pub struct OverlaySource {
    /// The deepest folder that holds both.
    pub parent: Source,
    /// The upper folder.
    pub upper: Below,
    /// The work folder.
    pub work: Below,
}

/// A folder some levels below [`OverlaySource::parent`].
#[derive(Debug)]
pub struct Below {
    /// The path from the parent.
    pub relative: PathBuf,
    /// The folder, as the host sees it.
    pub source: Source,
}

/// An opened volume.
#[derive(Debug)]
pub struct VolumeSource {
    /// The folder or file.
    pub source: Source,
    /// Refuse writes.
    pub read_only: bool,
    /// With what is mounted below.
    pub recursive: bool,
}

/// Everything that one share root is made of.
#[derive(Debug)]
pub struct Sources {
    /// In the spec's order.
    pub lowers: Vec<Source>,
    /// On top of them.
    pub top: TopSource,
    /// In the spec's order.
    pub volumes: Vec<VolumeSource>,
}

impl Sources {
    /// Opens and checks what `spec` names.
    ///
    /// # Errors
    /// The first path that cannot be shared, and why.
    pub fn open(spec: &ShareSpec) -> Result<Self, SourceError> {
        let by = spec.used_by;
        let lowers = spec.lowers.iter().map(|path| open_dir(by, What::Lower, path));
        let lowers = lowers.collect::<Result<_, _>>()?;
        let top = match &spec.top {
            Top::None => TopSource::None,
            Top::Overlay { upper, work } => TopSource::Overlay(open_overlay(by, upper, work)?),
            Top::Folder { path, read_only } => {
                TopSource::Folder { source: open_dir(by, What::Root, path)?, read_only: *read_only }
            }
        };
        let volumes = spec.volumes.iter().map(|volume| {
            let source = open(by, What::Volume, &volume.source)?;
            Ok(VolumeSource { source, read_only: volume.read_only, recursive: volume.recursive })
        });
        Ok(Self { lowers, top, volumes: volumes.collect::<Result<_, _>>()? })
    }

    /// Whether lowers and top lie on one file system of the host, so that inode numbers are unique among them.
    #[must_use]
    pub fn one_filesystem(&self) -> bool {
        let top = match &self.top {
            TopSource::None => None,
            TopSource::Overlay(overlay) => Some(&overlay.upper.source),
            TopSource::Folder { source, .. } => Some(source),
        };
        let mut devices = self.lowers.iter().chain(top).map(|source| source.id.dev);
        let first = devices.next();
        devices.all(|dev| Some(dev) == first)
    }
}

fn open_overlay(by: UsedBy, upper: &Path, work: &Path) -> Result<OverlaySource, SourceError> {
    let nested = || SourceError::Nested { upper: upper.to_owned(), work: work.to_owned() };
    let upper_source = open_dir(by, What::Upper, upper)?;
    let work_source = open_dir(by, What::Work, work)?;
    if upper_source.id.dev != work_source.id.dev {
        return Err(SourceError::TwoFilesystems { upper: upper.to_owned(), work: work.to_owned() });
    }
    let real_upper = canonical(What::Upper, upper)?;
    let real_work = canonical(What::Work, work)?;
    if real_upper.starts_with(&real_work) || real_work.starts_with(&real_upper) {
        return Err(nested());
    }
    check_writable(What::Upper, &upper_source)?;
    check_writable(What::Work, &work_source)?;
    check_xattrs(&upper_source)?;
    let parent = common_parent(&real_upper, &real_work);
    if parent == Path::new("/") {
        return Err(SourceError::CommonRoot { upper: upper.to_owned(), work: work.to_owned() });
    }
    let below = |real: &Path, source| match real.strip_prefix(&parent) {
        Ok(relative) => Ok(Below { relative: relative.to_owned(), source }),
        Err(_) => Err(nested()),
    };
    Ok(OverlaySource {
        upper: below(&real_upper, upper_source)?,
        work: below(&real_work, work_source)?,
        parent: open_dir(by, What::Parent, &parent)?,
    })
}

fn common_parent(a: &Path, b: &Path) -> PathBuf {
    a.components().zip(b.components()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

fn canonical(what: What, path: &Path) -> Result<PathBuf, SourceError> {
    path.canonicalize().map_err(|cause| open_error(what, path, cause))
}

fn open_error(what: What, path: &Path, cause: io::Error) -> SourceError {
    SourceError::Open { what, path: path.to_owned(), cause }
}

fn open_dir(by: UsedBy, what: What, path: &Path) -> Result<Source, SourceError> {
    let source = open(by, what, path)?;
    if source.is_dir {
        return Ok(source);
    }
    Err(SourceError::Type { what, path: path.to_owned(), found: "file", wanted: "a folder" })
}

/// Opens a folder or regular file for reading, and nothing else: the type is looked at through a descriptor
/// that cannot do I/O, since opening a device or fifo has effects of its own.
fn open(by: UsedBy, what: What, path: &Path) -> Result<Source, SourceError> {
    let fail = |cause| open_error(what, path, cause);
    let peek = peek(by, path).map_err(fail)?;
    let kind = peek.metadata().map_err(fail)?.file_type();
    if !kind.is_dir() && !kind.is_file() {
        let found = special_name(kind);
        return Err(SourceError::Type {
            what,
            path: path.to_owned(),
            found,
            wanted: "a folder or a regular file",
        });
    }
    let only_dirs = if kind.is_dir() { libc::O_DIRECTORY } else { 0 };
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | only_dirs;
    let seen = format!("/proc/self/fd/{}", peek.as_raw_fd());
    let file = OpenOptions::new().read(true).custom_flags(flags).open(seen).map_err(fail)?;
    let id = FileId::of(&file).map_err(fail)?;
    Ok(Source { path: path.to_owned(), is_dir: kind.is_dir(), id, file })
}

fn peek(by: UsedBy, path: &Path) -> io::Result<File> {
    match by {
        UsedBy::Union => folder::look(path, OFlags::PATH).map(File::from),
        // Its own links may lead to its folders, as containerd names them.
        UsedBy::Container => OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path),
    }
}

fn special_name(kind: std::fs::FileType) -> &'static str {
    if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_block_device() || kind.is_char_device() {
        "device"
    } else {
        "special file"
    }
}

fn check_writable(what: What, source: &Source) -> Result<(), SourceError> {
    let path = &source.path;
    let stat = rustix::fs::fstatvfs(source).map_err(|errno| open_error(what, path, errno.into()))?;
    if stat.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Err(SourceError::ReadOnly { what, path: path.clone() });
    }
    Ok(())
}

fn check_xattrs(upper: &Source) -> Result<(), SourceError> {
    let mut value = [0_u8; 0];
    match rustix::fs::fgetxattr(upper, OVERLAY_XATTR, &mut value) {
        Err(errno) if errno != rustix::io::Errno::NODATA => {
            Err(SourceError::NoXattrs { path: upper.path.clone(), cause: errno.into() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
