//! Folders that were checked under a path without symbolic links, and are opened by it later.
//!
//! Invariant: nobody who has put a symbolic link into the path meanwhile leads this process elsewhere.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Opens the folder. The path is absolute.
///
/// # Errors
/// As open(2); also when there is a symbolic link on the way, whose words are not those of ELOOP.
pub(crate) fn open(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).map_err(in_words)
}

/// What [`open`] fails with.
pub(crate) fn in_words(errno: Errno) -> io::Error {
    match errno {
        Errno::LOOP => io::Error::other("there is a symbolic link in its path, which was not there before"),
        other => other.into(),
    }
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
