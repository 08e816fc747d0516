//! One VM's own files: copies of the guest's kernel and initramfs, freed when the guest has booted, and the
//! guest's RAM where it comes from or goes into a template. They live on a detached tmpfs mount, which the
//! jail attaches and which ends with the last process that has it.
//!
//! QEMU maps kernel and initramfs for as long as it lives, though it reads them only while the guest starts:
//! tens of MiB per VM that nothing needs. This process can take back the copies' pages under QEMU's mappings;
//! a page of the host's own files could not be. After [`GuestFiles::free`] the mappings read as zeros, which
//! only a reset would see, and QEMU runs with `-no-reboot`.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use crate::jail::GuestFile;
use crate::memory::MemoryMib;

/// What the tmpfs may hold beside the RAM: no kernel and initramfs is larger.
const OTHER_FILES: MemoryMib = MemoryMib::new(1024);

/// A detached mount and what was put there.
#[derive(Debug)]
pub(crate) struct GuestFiles {
    mount: OwnedFd,
    boot: Vec<(GuestFile, File)>,
    has_ram: bool,
}

impl GuestFiles {
    /// Nothing yet, and room for so much RAM.
    pub(crate) fn with_room_for(ram: MemoryMib) -> io::Result<Self> {
        let mount = detached_tmpfs(ram.saturating_add(OTHER_FILES))?;
        Ok(Self { mount, boot: vec![], has_ram: false })
    }

    /// Copies what the guest boots. Reads and writes tens of MiB: not for a runtime's worker thread.
    pub(crate) fn copy_boot_files(&mut self, kernel: &Path, initramfs: &Path) -> io::Result<()> {
        for (file, source) in [(GuestFile::Kernel, kernel), (GuestFile::Initramfs, initramfs)] {
            let mut copy = self.create(file)?;
            io::copy(&mut File::open(source)?, &mut copy)?;
            self.boot.push((file, copy));
        }
        Ok(())
    }

    /// Makes the RAM, all zeros. QEMU's user may write to it; the mount is seen by no one else.
    pub(crate) fn add_ram(&mut self, size: MemoryMib) -> io::Result<File> {
        let ram = self.create(GuestFile::Ram)?;
        ram.set_permissions(Permissions::from_mode(0o666))?;
        ram.set_len(size.bytes())?;
        self.has_ram = true;
        Ok(ram)
    }

    /// For the jail, which attaches it.
    pub(crate) fn mount(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// What there is.
    pub(crate) fn names(&self) -> Vec<GuestFile> {
        let boot = self.boot.iter().map(|(name, _)| *name);
        boot.chain(self.has_ram.then_some(GuestFile::Ram)).collect()
    }

    /// Gives the memory of what the guest boots back.
    pub(crate) fn free(self) -> io::Result<()> {
        /// A page that is punched in part is zeroed, not freed. No page is larger.
        const WHOLE_PAGES: u64 = 1 << 21;
        for (_, file) in &self.boot {
            let whole = file.metadata()?.len().next_multiple_of(WHOLE_PAGES);
            fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, whole)?;
        }
        Ok(())
    }

    fn create(&self, name: GuestFile) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Ok(File::from(openat(&self.mount, name.name(), flags, Mode::from_raw_mode(0o444))?))
    }
}

fn detached_tmpfs(size: MemoryMib) -> io::Result<OwnedFd> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&tmpfs, "mode", "0755")?;
    fsconfig_set_string(&tmpfs, "size", format!("{}M", size.mib()))?;
    fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}
