//! Writes a tree beneath one root.
//!
//! Invariant: nothing outside the root is touched. In the overlay forms no link is followed; in plain form
//! the links of the tree are resolved within the root, as images expect (`bin -> usr/bin`). Metadata
//! are set in the order that keeps them: owner, mode, attributes, time; folders' times at the end.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use rustix::fs::{
    self, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;

use super::remove;
use crate::beneath::Node;
use crate::meta::{Device, Meta, Time, Xattrs};
use crate::path::{Escaped, TreePath};
use crate::upper::{Namespace, escape, is_content};

/// The kernel's limit on a path in one call.
const PATH_MAX: usize = 4096;

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A system call failed.
    #[error("{path} cannot be written")]
    Write {
        /// Where.
        path: TreePath,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An attribute is refused.
    #[error("{path} cannot get the attribute {name}")]
    Xattr {
        /// Where.
        path: TreePath,
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A hard link to what is not there, or to a folder.
    #[error("{path} is a hard link to {first}, which is no file in the tree")]
    Link {
        /// Where.
        path: TreePath,
        /// To what.
        first: TreePath,
    },
    /// A folder above is something else.
    #[error("{0} lies beneath something that is no folder in the tree")]
    NoFolder(TreePath),
}

/// Puts the place to an error.
pub(super) trait At<T> {
    fn at(self, path: &TreePath) -> Result<T, TreeError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, path: &TreePath) -> Result<T, TreeError> {
        self.map_err(|source| TreeError::Write { path: path.clone(), source: source.into() })
    }
}

/// What a deletion becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// It is carried out.
    Plain,
    /// A whiteout or an opaque mark, for an overlay with this namespace of attributes.
    Overlay(Namespace),
    /// Nothing: what comes is an overlay's own folder, with its whiteouts and marks, and is written as it is.
    Literal,
}

/// What is made.
pub(crate) enum Make<'a> {
    Dir,
    /// A regular file; the function fills it.
    File(&'a mut dyn FnMut(&File) -> io::Result<()>),
    Symlink(&'a [u8]),
    Char(Device),
    Block(Device),
    Fifo,
}

/// A tree that is being written.
pub(crate) struct Target {
    root: Node,
    form: Form,
    /// The folder written to last: entries come in order.
    parent: Option<(TreePath, Rc<OwnedFd>)>,
    /// Folders, whose times change with what is put into them.
    dirs: Vec<(TreePath, Time)>,
}

impl Target {
    pub(crate) fn new(root: Node, form: Form) -> Self {
        Self { root, form, parent: None, dirs: Vec::new() }
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// Makes an entry in place of what is there; a folder that is there gets new metadata.
    pub(crate) fn make(
        &mut self,
        path: &TreePath,
        meta: &Meta,
        xattrs: &Xattrs,
        make: Make<'_>,
    ) -> Result<(), TreeError> {
        if let Make::Dir = make {
            return self.dir(path, meta, xattrs);
        }
        let (dir, name) = self.clear(path)?;
        let node = create(dir.as_fd(), &name, make).at(path)?;
        self.set(path, &node, meta, xattrs)?;
        set_time(&node, meta.mtime).at(path)
    }

    /// Makes `path` a further name of `first`.
    pub(crate) fn link(&mut self, path: &TreePath, first: &TreePath) -> Result<(), TreeError> {
        let no_file = || TreeError::Link { path: path.clone(), first: first.clone() };
        let parent = self.open_dir(&first.parent().ok_or_else(no_file)?)?.ok_or_else(no_file)?;
        let parent = Node::new(parent).at(path)?;
        let node = parent.child(first.name().unwrap_or_default()).at(path)?.ok_or_else(no_file)?;
        if node.is_dir() {
            return Err(no_file());
        }
        let (dir, name) = self.clear(path)?;
        fs::linkat(CWD, node.magic_link(), &dir, OsStr::from_bytes(&name), AtFlags::SYMLINK_FOLLOW).at(path)
    }

    /// Says or does that `path` is gone.
    pub(crate) fn whiteout(&mut self, path: &TreePath) -> Result<(), TreeError> {
        let (dir, name) = self.clear(path)?;
        match self.form {
            Form::Plain | Form::Literal => Ok(()),
            Form::Overlay(_) => {
                let name = OsStr::from_bytes(&name);
                fs::mknodat(&dir, name, FileType::CharacterDevice, Mode::empty(), 0).at(path)
            }
        }
    }

    /// Says that nothing below shows in the folder `path`; overlay form only.
    pub(crate) fn opaque(&mut self, path: &TreePath, namespace: Namespace) -> Result<(), TreeError> {
        let node = self.existing_dir(path)?;
        let name = match namespace {
            Namespace::Trusted => b"trusted.overlay.opaque".as_slice(),
            Namespace::User => b"user.overlay.opaque",
        };
        set_xattr(&node, path, name, b"y")
    }

    /// Removes what is in the folder `path` except what `keep` says; plain form only.
    pub(crate) fn clear_dir(
        &mut self,
        path: &TreePath,
        keep: &dyn Fn(&TreePath) -> bool,
    ) -> Result<(), TreeError> {
        self.parent = None;
        let mut folders = vec![path.clone()];
        while let Some(folder) = folders.pop() {
            let node = self.existing_dir(&folder)?;
            for name in remove::names(&node).at(&folder)? {
                let path = folder.join(&name);
                let child = node.child(&name).at(&path)?;
                match keep(&path) {
                    true if child.is_some_and(|child| child.is_dir()) => folders.push(path),
                    true => {}
                    false => remove::remove(node.as_fd(), &name).at(&path)?,
                }
            }
        }
        Ok(())
    }

    /// Sets the times of folders, now that nothing is put into them any more.
    pub(crate) fn finish(mut self) -> Result<(), TreeError> {
        for (path, time) in std::mem::take(&mut self.dirs).iter().rev() {
            if let Some(dir) = self.open_dir(path)? {
                set_time(&Node::new(dir).at(path)?, *time).at(path)?;
            }
        }
        Ok(())
    }

    fn dir(&mut self, path: &TreePath, meta: &Meta, xattrs: &Xattrs) -> Result<(), TreeError> {
        let node = match path.name() {
            None => self.root.duplicate().at(path)?,
            Some(name) => self.make_dir(path, name)?,
        };
        self.set(path, &node, meta, xattrs)?;
        self.dirs.push((path.clone(), meta.mtime));
        Ok(())
    }

    fn make_dir(&mut self, path: &TreePath, name: &[u8]) -> Result<Node, TreeError> {
        let dir = self.parent_of(path)?;
        let there = child(&dir, name).at(path)?;
        if let Some(node) = there.filter(Node::is_dir) {
            return Ok(node);
        }
        let (dir, name) = self.clear(path)?;
        fs::mkdirat(&dir, OsStr::from_bytes(&name), Mode::RWXU).at(path)?;
        child(&dir, &name).at(path)?.ok_or_else(|| TreeError::NoFolder(path.clone()))
    }

    /// The folder above and the name, under which nothing is any more.
    fn clear(&mut self, path: &TreePath) -> Result<(Rc<OwnedFd>, Vec<u8>), TreeError> {
        let name = path.name().ok_or_else(|| TreeError::NoFolder(path.clone()))?.to_vec();
        let dir = self.parent_of(path)?;
        if let Some(node) = child(&dir, &name).at(path)? {
            if node.is_dir() {
                self.parent = None;
            }
            remove::remove(dir.as_fd(), &name).at(path)?;
        }
        Ok((dir, name))
    }

    /// The folder above `path`, made if a layer left it out.
    fn parent_of(&mut self, path: &TreePath) -> Result<Rc<OwnedFd>, TreeError> {
        let parent = path.parent().unwrap_or_default();
        if let Some((known, dir)) = &self.parent
            && *known == parent
        {
            return Ok(Rc::clone(dir));
        }
        let dir = match self.open_dir(&parent)? {
            Some(dir) => dir,
            None => self.make_parents(&parent)?,
        };
        let dir = Rc::new(dir);
        self.parent = Some((parent, Rc::clone(&dir)));
        Ok(dir)
    }

    fn make_parents(&self, path: &TreePath) -> Result<OwnedFd, TreeError> {
        let mut here = TreePath::root();
        let mut dir = self.open_dir(&here)?.ok_or_else(|| TreeError::NoFolder(path.clone()))?;
        for name in path.components() {
            here.push(name);
            if self.open_dir(&here)?.is_none() {
                let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
                match fs::mkdirat(&dir, OsStr::from_bytes(name), mode) {
                    Err(Errno::EXIST) => return Err(TreeError::NoFolder(path.clone())),
                    result => result.at(&here)?,
                }
            }
            dir = self.open_dir(&here)?.ok_or_else(|| TreeError::NoFolder(path.clone()))?;
        }
        Ok(dir)
    }

    fn existing_dir(&self, path: &TreePath) -> Result<Node, TreeError> {
        let dir = self.open_dir(path)?.ok_or_else(|| TreeError::NoFolder(path.clone()))?;
        Node::new(dir).at(path)
    }

    /// The folder `path`; `None` if there is none.
    fn open_dir(&self, path: &TreePath) -> Result<Option<OwnedFd>, TreeError> {
        let bytes = path.as_bytes();
        if bytes.len() >= PATH_MAX {
            let node = self.root.descend(path).at(path)?.filter(Node::is_dir);
            return node.map(|node| node.as_fd().try_clone_to_owned()).transpose().at(path);
        }
        let name = if bytes.is_empty() { b"." } else { bytes };
        let how = match self.form {
            Form::Plain => ResolveFlags::IN_ROOT,
            Form::Overlay(_) | Form::Literal => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        } | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match fs::openat2(self.root.as_fd(), OsStr::from_bytes(name), flags, Mode::empty(), how) {
            Ok(dir) => Ok(Some(dir)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error).at(path),
        }
    }

    fn set(&self, path: &TreePath, node: &Node, meta: &Meta, xattrs: &Xattrs) -> Result<(), TreeError> {
        let own = |id: u32| (fs::Uid::from_raw(id), fs::Gid::from_raw(id));
        let (uid, gid) = (own(meta.uid).0, own(meta.gid).1);
        fs::chownat(node.as_fd(), c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH).at(path)?;
        if node.stat.kind != FileType::Symlink {
            fs::chmod(node.magic_link(), Mode::from_raw_mode(meta.mode.into())).at(path)?;
        }
        for name in node.xattrs().at(path)?.keys().filter(|name| is_content(name)) {
            fs::removexattr(node.magic_link(), OsStr::from_bytes(name)).at(path)?;
        }
        for (name, value) in xattrs {
            match self.form {
                Form::Plain | Form::Literal => set_xattr(node, path, name, value)?,
                Form::Overlay(namespace) => set_xattr(node, path, &escape(namespace, name), value)?,
            }
        }
        Ok(())
    }
}

fn set_xattr(node: &Node, path: &TreePath, name: &[u8], value: &[u8]) -> Result<(), TreeError> {
    fs::setxattr(node.magic_link(), OsStr::from_bytes(name), value, XattrFlags::empty()).map_err(|error| {
        TreeError::Xattr { path: path.clone(), name: Escaped(name).to_string(), source: error.into() }
    })
}

fn set_time(node: &Node, time: Time) -> io::Result<()> {
    let time = Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(fs::utimensat(CWD, node.magic_link(), &times, AtFlags::empty())?)
}

fn child(dir: &OwnedFd, name: &[u8]) -> io::Result<Option<Node>> {
    Node::new(dir.try_clone()?)?.child(name)
}

fn create(dir: std::os::fd::BorrowedFd<'_>, name: &[u8], make: Make<'_>) -> io::Result<Node> {
    let name = OsStr::from_bytes(name);
    let device = |device: Device| fs::makedev(device.major, device.minor);
    let owner = Mode::RUSR | Mode::WUSR;
    match make {
        Make::File(fill) => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = File::from(fs::openat(dir, name, flags, owner)?);
            fill(&file)?;
        }
        Make::Symlink(target) => fs::symlinkat(OsStr::from_bytes(target), dir, name)?,
        Make::Char(number) => fs::mknodat(dir, name, FileType::CharacterDevice, owner, device(number))?,
        Make::Block(number) => fs::mknodat(dir, name, FileType::BlockDevice, owner, device(number))?,
        Make::Fifo => fs::mknodat(dir, name, FileType::Fifo, owner, 0)?,
        Make::Dir => fs::mkdirat(dir, name, Mode::RWXU)?,
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Node::new(fs::openat(dir, name, flags, Mode::empty())?)
}
