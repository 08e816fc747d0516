//! Opening what a guest may have made, beneath a folder that is already open.
//!
//! Invariant: nothing here follows a symbolic link, leaves the file system of the folder it starts
//! from, or opens anything but regular files and folders. Everything is first taken as an `O_PATH`
//! handle, which has no side effect on devices and fifos and never blocks; what it is, is asked of the
//! handle, and a regular file is then opened through the handle, so no name is looked up twice.
//!
//! ```text
//! folder fd ── openat2(name, O_PATH|O_NOFOLLOW, BENEATH|NO_SYMLINKS|NO_XDEV) ──> Node
//! Node ── statx(AT_EMPTY_PATH) ──> kind;  /proc/self/fd/N ──> attributes, and content if a regular file
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use crate::meta::{Stat, Xattrs};
use crate::path::TreePath;

/// The kernel takes no longer path in one call; one byte less for the NUL.
const PATH_STEP: usize = 4095;
/// The kernel's own bounds on attribute lists and values.
const XATTR_MAX: usize = 64 * 1024;
/// Per inode; also what the common readers of tar headers accept.
const XATTRS_TOTAL: usize = 1024 * 1024;

fn inside() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV
}

/// openat2(2) may ask to be called again when a rename raced with it.
fn openat2(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    const ATTEMPTS: u32 = 64;
    let mut result = Err(Errno::AGAIN);
    for _ in 0..ATTEMPTS {
        result = fs::openat2(dir, OsStr::from_bytes(name), flags | OFlags::CLOEXEC, Mode::empty(), inside());
        if !matches!(result, Err(Errno::AGAIN | Errno::INTR)) {
            break;
        }
    }
    result
}

/// Anything that a folder may hold, known but not opened.
#[derive(Debug)]
pub(crate) struct Node {
    fd: OwnedFd,
    pub stat: Stat,
}

impl Node {
    /// The root folder that everything else is beneath.
    pub(crate) fn root(path: &Path) -> io::Result<Self> {
        let fd = fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Self::new(fd)
    }

    /// A handle on the folder that `fd` is.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let statx = fs::statx(&fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        Ok(Self { stat: Stat::from(&statx), fd })
    }

    /// What `name` in this folder is; `None` if it is not there.
    pub(crate) fn child(&self, name: &[u8]) -> io::Result<Option<Self>> {
        absent(openat2(self.fd.as_fd(), name, OFlags::PATH | OFlags::NOFOLLOW))?.map(Self::new).transpose()
    }

    /// What `path` beneath this folder is, in steps that the kernel takes.
    pub(crate) fn descend(&self, path: &TreePath) -> io::Result<Option<Self>> {
        let mut rest = path.as_bytes();
        let mut here: Option<OwnedFd> = None;
        while !rest.is_empty() {
            let (step, after) = split_step(rest);
            let dir = here.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd);
            match absent(openat2(dir, step, OFlags::PATH | OFlags::NOFOLLOW))? {
                Some(fd) => here = Some(fd),
                None => return Ok(None),
            }
            rest = after;
        }
        here.map_or_else(|| self.duplicate(), Self::new).map(Some)
    }

    /// A second handle on the same inode, with its present state.
    pub(crate) fn duplicate(&self) -> io::Result<Self> {
        Self::new(self.fd.try_clone()?)
    }

    /// The state now.
    pub(crate) fn stat_again(&self) -> io::Result<Stat> {
        let statx = fs::statx(&self.fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        Ok(Stat::from(&statx))
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.stat.kind == FileType::Directory
    }

    /// Opens a folder for listing.
    pub(crate) fn open_dir(&self) -> io::Result<OwnedFd> {
        Ok(openat2(self.fd.as_fd(), b".", OFlags::RDONLY | OFlags::DIRECTORY)?)
    }

    /// Opens a regular file; anything else is refused without being opened.
    pub(crate) fn open_file(&self) -> io::Result<File> {
        if self.stat.kind != FileType::RegularFile {
            return Err(io::Error::other("not a regular file"));
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOATIME;
        let open = |flags| fs::open(self.magic_link(), flags, Mode::empty());
        // Without CAP_FOWNER another owner's file cannot be read without touching its access time.
        match open(flags) {
            Err(Errno::PERM) => Ok(open(flags - OFlags::NOATIME)?.into()),
            other => Ok(other?.into()),
        }
    }

    /// Where a symbolic link points.
    pub(crate) fn read_link(&self) -> io::Result<Vec<u8>> {
        Ok(fs::readlinkat(&self.fd, c"", Vec::new())?.into_bytes())
    }

    /// One attribute; `None` if it is not there.
    pub(crate) fn xattr(&self, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let (path, name) = (self.magic_link(), OsStr::from_bytes(name));
        match grown(|buffer| fs::getxattr(&path, name, rustix::buffer::spare_capacity(buffer))) {
            Ok(value) => Ok(Some(value)),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// All attributes, as they are stored.
    pub(crate) fn xattrs(&self) -> io::Result<Xattrs> {
        let path = self.magic_link();
        let list = match grown(|buffer| fs::listxattr(&path, rustix::buffer::spare_capacity(buffer))) {
            Err(Errno::OPNOTSUPP) => return Ok(Xattrs::new()),
            other => other?,
        };
        let mut xattrs = Xattrs::new();
        let mut total = 0;
        for name in list.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let Some(value) = self.xattr(name)? else { continue };
            total += name.len() + value.len();
            if total > XATTRS_TOTAL {
                return Err(io::Error::other("its extended attributes are larger than 1 MiB together"));
            }
            xattrs.insert(name.to_vec(), value);
        }
        Ok(xattrs)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Leads to exactly this inode, whatever its name means by now.
    pub(crate) fn magic_link(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }
}

/// A name that is gone, or whose folder has become something else, is absent.
fn absent<T>(result: rustix::io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Calls with a small buffer first and with the largest that the kernel fills if that was too small.
fn grown(mut call: impl FnMut(&mut Vec<u8>) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = Vec::with_capacity(512);
    match call(&mut buffer) {
        Err(Errno::RANGE) => buffer = Vec::with_capacity(XATTR_MAX),
        other => return other.map(|_| buffer),
    }
    call(&mut buffer)?;
    Ok(buffer)
}

/// As many components as the kernel takes at once, and the rest.
fn split_step(path: &[u8]) -> (&[u8], &[u8]) {
    if path.len() < PATH_STEP {
        return (path, &[]);
    }
    let end = path[..PATH_STEP].iter().rposition(|&byte| byte == b'/').unwrap_or(path.len());
    (&path[..end], path.get(end + 1..).unwrap_or(&[]))
}

/// Fails with a clear reason where handles could not be followed.
pub(crate) fn check_proc() -> io::Result<()> {
    fs::access("/proc/self/fd", fs::Access::EXISTS)
        .map_err(|_| io::Error::other("/proc is not mounted; it is needed to read extended attributes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn node(dir: &tempfile::TempDir) -> Node {
        Node::root(dir.path()).unwrap()
    }

    #[test]
    fn links_are_seen_and_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/etc", dir.path().join("out")).unwrap();
        let root = node(&dir);
        let link = root.child(b"out").unwrap().unwrap();
        assert_eq!(link.stat.kind, FileType::Symlink);
        assert_eq!(link.read_link().unwrap(), b"/etc");
        assert!(link.open_file().is_err());
        assert!(root.descend(&TreePath::parse(b"out/passwd").unwrap()).unwrap().is_none());
    }

    #[test]
    fn a_fifo_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = node(&dir);
        fs::mknodat(root.as_fd(), "fifo", FileType::Fifo, Mode::RUSR, 0).unwrap();
        let fifo = root.child(b"fifo").unwrap().unwrap();
        assert_eq!(fifo.stat.kind, FileType::Fifo);
        assert!(fifo.open_file().is_err());
        assert!(fifo.xattrs().unwrap().is_empty());
    }

    #[test]
    fn a_handle_stays_with_its_inode_when_the_name_changes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), "before").unwrap();
        let file = node(&dir).child(b"f").unwrap().unwrap();
        std::fs::rename(dir.path().join("f"), dir.path().join("g")).unwrap();
        symlink("/etc/passwd", dir.path().join("f")).unwrap();
        assert_eq!(io::read_to_string(file.open_file().unwrap()).unwrap(), "before");
    }

    #[test]
    fn large_attributes_are_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "").unwrap();
        fs::setxattr(&path, "user.large", &[7; 3000], fs::XattrFlags::empty()).unwrap();
        fs::setxattr(&path, "user.empty", &[], fs::XattrFlags::empty()).unwrap();
        let xattrs = node(&dir).child(b"f").unwrap().unwrap().xattrs().unwrap();
        assert_eq!(xattrs[b"user.large".as_slice()], vec![7; 3000]);
        assert_eq!(xattrs[b"user.empty".as_slice()], b"");
    }

    #[test]
    fn steps_end_at_components() {
        let path = [b"x".repeat(3000), b"y".repeat(2000)].join(&b'/');
        assert_eq!(split_step(&path), (&path[..3000], &path[3001..]));
        assert_eq!(split_step(b"a/b"), (&b"a/b"[..], &b""[..]));
    }
}
