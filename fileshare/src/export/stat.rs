//! Attributes as the protocol has them, from those that the kernel tells: by one rule on both sides, so that a file
//! looks the same whichever of them is asked.

use rustix::fs::Statx;

use super::wire::abi::Attr;

/// What statx(2) tells of a file, with this inode number.
pub(super) fn attr(st: &Statx, ino: u64) -> Attr {
    Attr {
        ino,
        size: st.stx_size,
        blocks: st.stx_blocks,
        atime: st.stx_atime.tv_sec.cast_unsigned(),
        mtime: st.stx_mtime.tv_sec.cast_unsigned(),
        ctime: st.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: st.stx_atime.tv_nsec,
        mtimensec: st.stx_mtime.tv_nsec,
        ctimensec: st.stx_ctime.tv_nsec,
        mode: u32::from(st.stx_mode),
        nlink: st.stx_nlink,
        uid: st.stx_uid,
        gid: st.stx_gid,
        rdev: device_number(st.stx_rdev_major, st.stx_rdev_minor),
        blksize: st.stx_blksize,
        flags: 0,
    }
}

/// A device number as the kernel packs it into 32 bits.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The reverse, as mknod(2) wants it.
pub fn device(number: u32) -> rustix::fs::Dev {
    rustix::fs::makedev((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_come_back() {
        for (major, minor) in [(0, 0), (1, 3), (259, 70_000), (4095, 0xf_ffff)] {
            assert_eq!(device(device_number(major, minor)), rustix::fs::makedev(major, minor));
        }
    }
}
