//! Files that appear complete and on disk, or not at all.
//!
//! A file is written without a name (`O_TMPFILE`) and gets one at the end: a crash leaves nothing.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{self, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// A file without a name in the folder `dir`.
pub(super) fn nameless(dir: &Path) -> io::Result<File> {
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let file = fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode)?;
    fs::fchmod(&file, mode)?;
    Ok(file.into())
}

/// Gives a file its name; whether nothing had that name before.
pub(super) fn name(file: &File, path: &Path) -> io::Result<bool> {
    file.sync_all()?;
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    match fs::linkat(CWD, link, CWD, path, AtFlags::SYMLINK_FOLLOW) {
        Err(Errno::EXIST) => Ok(false),
        result => result.map(|()| true).map_err(io::Error::from),
    }
}

/// Replaces a small file.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".vmctr-partial");
    std::fs::write(&partial, bytes)?;
    File::open(&partial)?.sync_all()?;
    std::fs::rename(&partial, path)
}

/// Makes the names in a folder durable.
pub(super) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The folder that holds `path`.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
