//! The system calls of the jail that have no safe wrapper.

use std::ffi::CString;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::{io, mem};

/// Gives `fds` the numbers `first` and up, open across exec, and marks every higher descriptor close-on-exec.
/// Returns `other`, an inherited descriptor that is not to be kept. The caller owns all these numbers and
/// uses none of them any more.
pub(super) fn place_fds(fds: &[i32], other: i32, first: i32) -> io::Result<OwnedFd> {
    let end = first + i32::try_from(fds.len()).map_err(io::Error::other)?;
    let other = duplicate_above(other, end)?;
    let above: Vec<i32> = fds.iter().map(|fd| duplicate_above(*fd, end)).collect::<Result<_, _>>()?;
    for (target, fd) in (first..).zip(above) {
        // SAFETY: both are plain numbers. `target` may hold a descriptor that the process was started
        // with; none of those belongs to a live object.
        check(unsafe { libc::dup2(fd, target) })?;
    }
    let from = u32::try_from(end).map_err(io::Error::other)?;
    let flags = i32::try_from(libc::CLOSE_RANGE_CLOEXEC).map_err(io::Error::other)?;
    // SAFETY: only sets a flag on descriptors; objects that own them stay valid.
    check(unsafe { libc::close_range(from, u32::MAX, flags) })?;
    // SAFETY: the number was made above and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(other) })
}

fn duplicate_above(fd: i32, lowest: i32) -> io::Result<i32> {
    // SAFETY: F_DUPFD takes plain numbers; a number that is not open is reported as an error.
    check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest) })
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes the mount at `path` and all mounts below it read-only and deaf to set-user-ID bits.
pub(super) fn make_read_only(path: &str) -> io::Result<()> {
    let set = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
    change_mount(Path::new(path), libc::AT_RECURSIVE, set, 0)
}

/// Makes the one mount at `path` writable again.
pub(super) fn make_writable(path: &Path) -> io::Result<()> {
    change_mount(path, 0, 0, libc::MOUNT_ATTR_RDONLY)
}

fn change_mount(path: &Path, flags: libc::c_int, set: u64, clear: u64) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the structure is plain numbers, for which all-zero bytes are valid.
    let mut attributes: libc::mount_attr = unsafe { mem::zeroed() };
    (attributes.attr_set, attributes.attr_clr) = (set, clear);
    // SAFETY: `path` ends with NUL; the structure lives through the call and its true size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            mem::size_of_val(&attributes),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
