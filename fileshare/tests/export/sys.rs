//! What has no safe wrapper: shared memory on a file, and a thread with descriptors of its own.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Gives this thread a table of descriptors with only the first three in it.
pub fn own_descriptors() {
    // SAFETY: the call touches no memory; what it closes stays open for everybody else.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    assert_eq!(result, 0);
}

/// A shared mapping of a file's first bytes.
pub struct Shared {
    at: *mut u8,
    length: usize,
}

impl Shared {
    pub fn of(file: &File, length: usize, writable: bool) -> std::io::Result<Self> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: the kernel chooses a free place; nothing that is mapped already is touched.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            Err(std::io::Error::last_os_error())
        } else {
            Ok(Self { at: at.cast(), length })
        }
    }

    pub fn get(&self, at: usize) -> u8 {
        assert!(at < self.length);
        // SAFETY: within the mapping, which lives as long as `self`; bytes may change under us, so volatile.
        unsafe { self.at.add(at).read_volatile() }
    }

    pub fn set(&self, at: usize, value: u8) {
        assert!(at < self.length);
        // SAFETY: as in `get`; the mapping is writable, or the process gets a signal.
        unsafe { self.at.add(at).write_volatile(value) }
    }

    pub fn sync(&self) {
        // SAFETY: the whole mapping, which is there.
        assert_eq!(unsafe { libc::msync(self.at.cast(), self.length, libc::MS_SYNC) }, 0);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `of` and nobody has a pointer into it.
        unsafe { libc::munmap(self.at.cast(), self.length) };
    }
}
