//! Streams that nobody wants are the container's `/dev/null`, for reading and writing.
//!
//! libcontainer opens such a stream anew inside the container, so that it holds no file of the guest's root. It
//! does so for reading only, and the first thing that the program prints would fail.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, major, minor, open};
use rustix::io::{Errno, Result};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr, stdin, stdout};

/// The kernel's numbers for the device.
const NULL: (u32, u32) = (1, 3);

/// Makes each standard stream that is a `/dev/null` for reading one for both.
pub fn reopen() -> Result<()> {
    let read_only = [read_only_null(stdin())?, read_only_null(stdout())?, read_only_null(stderr())?];
    if !read_only.contains(&true) {
        return Ok(());
    }
    let null: OwnedFd = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?;
    if !is_null(&null)? {
        return Err(Errno::NODEV);
    }
    let [stdin, stdout, stderr] = read_only.map(|again| again.then_some(&null));
    stdin.map_or(Ok(()), dup2_stdin)?;
    stdout.map_or(Ok(()), dup2_stdout)?;
    stderr.map_or(Ok(()), dup2_stderr)
}

fn read_only_null(stream: impl AsFd) -> Result<bool> {
    Ok(fcntl_getfl(&stream)? & OFlags::ACCMODE == OFlags::RDONLY && is_null(stream)?)
}

fn is_null(stream: impl AsFd) -> Result<bool> {
    let stat = fstat(stream)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    Ok(is_device && (major(stat.st_rdev), minor(stat.st_rdev)) == NULL)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn only_a_null_device_for_reading_is_opened_anew() {
        assert!(read_only_null(File::open("/dev/null").unwrap()).unwrap());
        assert!(!read_only_null(File::options().write(true).open("/dev/null").unwrap()).unwrap());
        assert!(!read_only_null(File::open("/dev/zero").unwrap()).unwrap());
        assert!(!read_only_null(tempfile::tempfile().unwrap()).unwrap());
    }
}
