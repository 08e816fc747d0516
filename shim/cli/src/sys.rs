//! The one system call that has no safe wrapper.

/// No program that is started later gets a descriptor from here, but for the standard three. What this process was
/// started with would live as long as its background process does: a caller's lock, the end of a caller's pipe.
pub fn keep_descriptors() {
    const FIRST: u32 = 3;
    // A kernel before 5.11 does not know the flag: there, the callers' descriptors are passed on.
    // SAFETY: it only sets a flag on descriptors; objects that own them stay valid.
    unsafe { libc::syscall(libc::SYS_close_range, FIRST, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}
