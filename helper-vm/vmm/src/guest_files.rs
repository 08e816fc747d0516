//! One VM's own copies of the guest's kernel and initramfs, in memory, freed when the guest has booted.
//!
//! QEMU maps both files for as long as it lives, though it reads them only while the guest starts: tens of
//! MiB per VM that nothing needs. The copies live on a detached tmpfs mount, whose pages this process can
//! take back under QEMU's mappings; a page of the host's own files could not be. After [`GuestFiles::free`]
//! the mappings read as zeros, which only a reset would see, and QEMU runs with `-no-reboot`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use crate::jail::GUEST_FILES;

/// A detached mount with the files of [`GUEST_FILES`].
#[derive(Debug)]
pub(crate) struct GuestFiles {
    mount: OwnedFd,
    files: Vec<File>,
}

impl GuestFiles {
    /// Copies the kernel and the initramfs. Reads and writes tens of MiB: not for a runtime's worker thread.
    pub(crate) fn copy(sources: [&Path; 2]) -> io::Result<Self> {
        let mount = detached_tmpfs()?;
        let copy = |(name, source)| copy_into(&mount, name, source);
        let files = GUEST_FILES.into_iter().zip(sources).map(copy).collect::<io::Result<_>>()?;
        Ok(Self { mount, files })
    }

    /// For the jail, which attaches it.
    pub(crate) fn mount(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Gives the memory back.
    pub(crate) fn free(self) -> io::Result<()> {
        /// A page that is punched in part is zeroed, not freed. No page is larger.
        const WHOLE_PAGES: u64 = 1 << 21;
        for file in &self.files {
            let whole = file.metadata()?.len().next_multiple_of(WHOLE_PAGES);
            fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, whole)?;
        }
        Ok(())
    }
}

fn detached_tmpfs() -> io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "mode", "0755")?;
    fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn copy_into(mount: &OwnedFd, name: &str, source: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut copy = File::from(openat(mount, name, flags, Mode::from_raw_mode(0o444))?);
    io::copy(&mut File::open(source)?, &mut copy)?;
    Ok(copy)
}
