//! Folders, opened so that nobody leads this process elsewhere.
//!
//! Invariants:
//! 1. A folder that was checked under a path without symbolic links is opened by that, however late: who has put a
//!    link into the path meanwhile has it refused.
//! 2. What is below a folder can be had without other mounts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use crate::sys::Reach;

/// Opens a folder by an absolute path.
///
/// # Errors
/// As open(2); also when there is a symbolic link on the way, in other words than those of ELOOP.
pub(crate) fn open(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    look(path, flags | OFlags::DIRECTORY)
}

/// Opens whatever is there. Only to look at it with `O_PATH`: opening a device or fifo has effects of its own.
///
/// # Errors
/// As [`open`].
pub(crate) fn look(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).map_err(|errno| {
        match errno {
            Errno::LOOP => {
                io::Error::other("there is a symbolic link in its path, which was not there before")
            }
            other => other.into(),
        }
    })
}

/// A copy of the mount that a folder is reached through, from that folder on, in no namespace.
///
/// # Errors
/// As open_tree(2), which takes CAP_SYS_ADMIN.
pub(crate) fn clone_tree(folder: impl AsFd, reach: Reach) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, reach == Reach::All);
    Ok(rustix::mount::open_tree(folder, "", flags)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_that_came_later_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        fs::create_dir_all(dir.join("home/mnt")).unwrap();
        fs::create_dir_all(dir.join("etc/mnt")).unwrap();
        assert!(open(&dir.join("home/mnt"), OFlags::PATH).is_ok());
        fs::rename(dir.join("home"), dir.join("away")).unwrap();
        symlink("etc", dir.join("home")).unwrap();
        symlink("../etc", dir.join("etc/link")).unwrap();
        for path in ["home/mnt", "home", "etc/link"] {
            let error = open(&dir.join(path), OFlags::PATH).unwrap_err();
            assert!(error.to_string().contains("symbolic link"), "{path}: {error}");
        }
        let none = open(&dir.join("none"), OFlags::PATH).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }
}
