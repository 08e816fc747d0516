//! The guest's file systems, as one table.

use std::fs;
use std::io;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move};
use rustix::process::{chdir, chroot};

/// One mount of the table.
struct Entry {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const NOTHING: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
const DATA: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// Needed to read devices and load modules; they move along to the new root.
const EARLY: [Entry; 3] = [
    Entry { kind: "proc", target: "/proc", flags: NOTHING, data: "" },
    Entry { kind: "sysfs", target: "/sys", flags: NOTHING, data: "" },
    Entry { kind: "devtmpfs", target: "/dev", flags: DEVICES, data: "mode=755" },
];

const REST: [Entry; 6] = [
    Entry { kind: "devpts", target: "/dev/pts", flags: DEVICES, data: "mode=620,ptmxmode=666" },
    Entry { kind: "tmpfs", target: "/dev/shm", flags: NOTHING, data: "mode=1777" },
    Entry { kind: "mqueue", target: "/dev/mqueue", flags: NOTHING, data: "" },
    Entry { kind: "tmpfs", target: "/run", flags: DATA, data: "mode=755" },
    Entry { kind: "tmpfs", target: "/tmp", flags: DATA, data: "mode=1777" },
    // Processes move into groups often here, and fork less.
    Entry { kind: "cgroup2", target: "/sys/fs/cgroup", flags: NOTHING, data: "favordynmods" },
];

const NEW_ROOT: &str = "/newroot";

/// /proc, /sys and /dev.
pub fn early() -> io::Result<()> {
    EARLY.iter().try_for_each(Entry::mount)
}

/// Everything else.
pub fn rest() -> io::Result<()> {
    REST.iter().try_for_each(Entry::mount)
}

/// Moves PID 1 from the initramfs onto a fresh tmpfs. The initramfs stays below, out of reach by path;
/// /proc/self/exe still names the agent in it.
pub fn leave_rootfs() -> io::Result<()> {
    let root = Entry { kind: "tmpfs", target: NEW_ROOT, flags: DATA, data: "mode=755" };
    root.mount()?;
    for early in &EARLY {
        let target = format!("{NEW_ROOT}{}", early.target);
        fs::create_dir(&target)?;
        mount_move(early.target, &target)?;
    }
    chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    Ok(())
}

impl Entry {
    fn mount(&self) -> io::Result<()> {
        fs::create_dir_all(self.target)?;
        let data = std::ffi::CString::new(self.data)?;
        mount(self.kind, self.target, self.kind, self.flags, data.as_c_str()).map_err(|error| {
            io::Error::new(error.kind(), format!("{} on {}: {error}", self.kind, self.target))
        })
    }
}
