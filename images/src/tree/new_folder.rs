//! The new folder: what a container changed, in overlay form, for use as the next lower layer.
//!
//! ```text
//! DIR's parent/
//!   .DIR.vmctr-partial/    locked while it is written; a leftover of a crash is removed by the next try
//!   DIR/                   appears by rename, complete and on disk
//! ```
//!
//! Invariant: redirects and metacopies are resolved, so that the folder needs no overlay feature beyond
//! whiteouts and opaque marks, and the layers below it stay the same.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::remove;
use super::target::{At, Form, Make, Target, TreeError};
use crate::beneath::Node;
use crate::path::TreePath;
use crate::upper::{Change, Consistency, Content, Entry, EntryKind, Namespace, Walk, WalkError, What};

/// The longest path that the kernel takes, with its final NUL.
const PATH_MAX: usize = 4096;

/// How often a file that is written meanwhile is copied again.
const ATTEMPTS: u32 = 4;

/// Why a new folder cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum NewFolderError {
    /// The changes cannot be read.
    #[error("The changes cannot be read")]
    Walk(#[from] WalkError),
    /// The tree cannot be written.
    #[error("The new folder cannot be written")]
    Tree(#[from] TreeError),
    /// It is there already.
    #[error("{0:?} exists; name a new folder or remove it")]
    Exists(PathBuf),
    /// Another commit writes it.
    #[error("{0:?} is being written by another commit")]
    Busy(PathBuf),
    /// A snapshotter names files by their whole paths.
    #[error(
        "{0} is a path too long for containerd's snapshots; --output oci:DIR, --output oci-archive:FILE and \
         --to-dir DIR keep it"
    )]
    LongPath(TreePath),
    /// Whoever watches called it off.
    #[error("The copy was ended early")]
    Watch(#[source] io::Error),
    /// The folder itself cannot be made.
    #[error("{path:?} cannot be made")]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NewFolder {
    /// Entries, whiteouts included.
    pub entries: u64,
    /// Files that kept changing: their last copy is in the folder.
    pub changed: Vec<TreePath>,
}

/// Told after each entry how many bytes the files copied so far have; an error ends the copy.
pub type Copied<'a> = dyn FnMut(u64) -> io::Result<()> + 'a;

/// Writes the changes of `walk` to `dir`, which must not exist.
pub fn write_new_folder(
    walk: &mut Walk<'_>,
    dir: &Path,
    namespace: Namespace,
    consistency: Consistency,
    copied: &mut Copied<'_>,
) -> Result<NewFolder, NewFolderError> {
    let make = |source: io::Error| NewFolderError::Make { path: dir.to_owned(), source };
    if dir.symlink_metadata().is_ok() {
        return Err(NewFolderError::Exists(dir.to_owned()));
    }
    let partial = Partial::begin(dir)?;
    let root = partial.node.duplicate().map_err(make)?;
    let mut told = |_: &TreePath, bytes| copied(bytes).map_err(NewFolderError::Watch);
    let written = fill(walk, root, Form::Overlay(namespace), consistency, &mut told)?;
    partial.publish(dir)?;
    Ok(written)
}

/// Writes the changes of `walk` into a folder that is there: in overlay form an empty one, in plain form
/// a copy of what the base shows.
pub fn fill_folder(
    walk: &mut Walk<'_>,
    dir: &Path,
    form: Form,
    consistency: Consistency,
    copied: &mut Copied<'_>,
) -> Result<NewFolder, NewFolderError> {
    let root = Node::root(dir).map_err(|source| NewFolderError::Make { path: dir.to_owned(), source })?;
    // The kernel's limit counts a final NUL, and there is a slash between the two.
    let longest = PATH_MAX.saturating_sub(dir.as_os_str().len() + 2);
    fill(walk, root, form, consistency, &mut |path, bytes| {
        if path.as_bytes().len() > longest {
            return Err(NewFolderError::LongPath(path.clone()));
        }
        copied(bytes).map_err(NewFolderError::Watch)
    })
}

fn fill(
    walk: &mut Walk<'_>,
    root: Node,
    form: Form,
    consistency: Consistency,
    told: &mut dyn FnMut(&TreePath, u64) -> Result<(), NewFolderError>,
) -> Result<NewFolder, NewFolderError> {
    let mut target = Target::new(root, form);
    let (mut written, mut bytes) = (NewFolder::default(), 0u64);
    while let Some(change) = walk.next_change()? {
        written.entries += 1;
        add(&mut target, &change, consistency, &mut written)?;
        bytes = bytes.saturating_add(change.bytes());
        told(&change.path, bytes)?;
    }
    if let Some(root) = walk.silent_root() {
        add(&mut target, &root, consistency, &mut written)?;
    }
    target.finish()?;
    Ok(written)
}

fn add(
    target: &mut Target,
    change: &Change,
    consistency: Consistency,
    written: &mut NewFolder,
) -> Result<(), NewFolderError> {
    let path = &change.path;
    let entry = match &change.what {
        What::Entry(entry) | What::Parent(entry) => entry,
        What::Whiteout => return Ok(target.whiteout(path)?),
        What::Opaque => return Ok(hide(target, path)?),
    };
    let make = match &entry.kind {
        EntryKind::File(content) => return file(target, path, entry, content, consistency, written),
        EntryKind::Link(first) => return Ok(target.link(path, first)?),
        EntryKind::Dir => Make::Dir,
        EntryKind::Symlink(to) => Make::Symlink(to),
        EntryKind::Char(device) => Make::Char(*device),
        EntryKind::Block(device) => Make::Block(*device),
        EntryKind::Fifo => Make::Fifo,
    };
    Ok(target.make(path, &entry.meta, &entry.xattrs, make)?)
}

/// A walk marks a folder before it tells what is in it: all that is there now is the base's.
fn hide(target: &mut Target, path: &TreePath) -> Result<(), TreeError> {
    match target.form() {
        Form::Overlay(namespace) => target.opaque(path, namespace),
        Form::Plain | Form::Literal => target.clear_dir(path, &|_| false),
    }
}

/// Copies a file, again if it was written meanwhile.
fn file(
    target: &mut Target,
    path: &TreePath,
    entry: &Entry,
    content: &Content,
    consistency: Consistency,
    written: &mut NewFolder,
) -> Result<(), NewFolderError> {
    let attempts = if consistency == Consistency::Live { ATTEMPTS } else { 1 };
    for attempt in 0..attempts {
        let mut reader = if attempt == 0 { content.open() } else { content.open_anew() }.at(path)?;
        let meta = if attempt == 0 { entry.meta } else { reader.meta() };
        let copied = target.make(path, &meta, &entry.xattrs, Make::File(&mut |file| reader.copy_to(file)));
        let whole = match copied {
            Err(TreeError::Write { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => false,
            result => result.map(|()| true)?,
        };
        if whole && reader.unchanged().at(path)? {
            return Ok(());
        }
    }
    match consistency {
        Consistency::Frozen => Err(WalkError::Changed(path.clone()).into()),
        Consistency::Live => {
            written.changed.push(path.clone());
            Ok(())
        }
    }
}

/// A folder that nobody sees under its own name yet.
struct Partial {
    path: PathBuf,
    node: Node,
    /// Held for its lock.
    _lock: rustix::fd::OwnedFd,
    published: bool,
}

impl Partial {
    fn begin(dir: &Path) -> Result<Self, NewFolderError> {
        let path = partial_name(dir);
        let make = |source: io::Error| NewFolderError::Make { path: dir.to_owned(), source };
        Self::clear(dir, &path)?;
        fs::mkdir(&path, Mode::RWXU).map_err(|error| make(error.into()))?;
        let lock = Self::lock(dir, &path)?;
        let node = Node::root(&path).map_err(make)?;
        Ok(Self { path, node, _lock: lock, published: false })
    }

    /// Removes what a crash left.
    fn clear(dir: &Path, path: &Path) -> Result<(), NewFolderError> {
        if path.symlink_metadata().is_err() {
            return Ok(());
        }
        let _lock = Self::lock(dir, path)?;
        remove_all(path).map_err(|source| NewFolderError::Make { path: path.to_owned(), source })
    }

    fn lock(dir: &Path, path: &Path) -> Result<rustix::fd::OwnedFd, NewFolderError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = || {
            let fd = fs::open(path, flags, Mode::empty())?;
            fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).map(|()| fd)
        };
        lock().map_err(|error| match error {
            Errno::WOULDBLOCK => NewFolderError::Busy(dir.to_owned()),
            error => NewFolderError::Make { path: path.to_owned(), source: error.into() },
        })
    }

    /// Makes it visible once it is on disk.
    fn publish(mut self, dir: &Path) -> Result<(), NewFolderError> {
        let mut publish = || {
            fs::syncfs(self.node.open_dir()?)?;
            fs::renameat_with(CWD, &self.path, CWD, dir, fs::RenameFlags::NOREPLACE)?;
            self.published = true;
            sync_folder(parent(dir))
        };
        publish().map_err(|source| NewFolderError::Make { path: dir.to_owned(), source })
    }
}

/// What failed leaves nothing.
impl Drop for Partial {
    fn drop(&mut self) {
        if !self.published {
            let _ = remove_all(&self.path);
        }
    }
}

fn partial_name(dir: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(dir.file_name().unwrap_or_default());
    name.push(".vmctr-partial");
    parent(dir).join(name)
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn remove_all(path: &Path) -> io::Result<()> {
    let parent = Node::root(parent(path))?;
    remove::remove(parent.as_fd(), path.file_name().unwrap_or_default().as_bytes())
}

/// Makes names in a folder durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}
