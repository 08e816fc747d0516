//! What QEMU is confined to: [`JailSpec`] says it, the binary `vmctr-jail` does it ([`enter`]) and then
//! becomes QEMU.
//!
//! ```text
//!   /            tmpfs, read-only, private to this process
//!   ├── usr      the host's, read-only; bin, lib, lib64, ... as on the host (symlinks or the directories)
//!   ├── (opt/x)  QEMU's own prefix, when it is not in /usr, read-only
//!   ├── etc/ld.so.cache
//!   ├── guest/kernel, guest/initramfs, guest/ram      this VM's own, see `guest_files`
//!   └── dev/null, dev/urandom
//! ```
//!
//! Invariants: no file that QEMU sees is writable but its guest's RAM, where that is a file; its user owns nothing and
//! is shared with no other live process; it has no capabilities, no network, and no file descriptors but the listed
//! ones. `/dev/kvm` is one of those, opened by the parent, so that its user needs no right to the device's node.

pub mod enter;
mod sys;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::FirstUid;
use crate::spec::VmSpec;

/// Exit status of `vmctr-jail` when it could not become QEMU; its stderr says why.
pub const EXIT_STATUS: i32 = 125;

/// Directory of the VM's copies of the guest's files inside the jail.
pub const GUEST_DIR: &str = "/guest";

/// A file of one VM's own in [`GUEST_DIR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestFile {
    /// What the guest boots.
    Kernel,
    /// Its first file system.
    Initramfs,
    /// Its memory, where that comes from or goes into a template.
    Ram,
}

impl GuestFile {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Ram => "ram",
        }
    }

    /// Where QEMU sees it.
    #[must_use]
    pub fn path(self) -> String {
        format!("{GUEST_DIR}/{}", self.name())
    }

    /// Whether QEMU may write to it.
    #[must_use]
    pub fn is_writable(self) -> bool {
        self == Self::Ram
    }
}

/// First number of the passed file descriptors inside the jail; the others follow in order.
pub const FIRST_FD: i32 = 3;

/// Everything that `vmctr-jail` needs; its only argument, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailSpec {
    /// The process that must be its parent, whose end ends it.
    pub parent: u32,
    /// See [`FirstUid::for_pid`].
    pub first_uid: FirstUid,
    /// What to run, as a path on the host and in the jail.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Directory outside `/usr` that holds the program and what it needs, if that is where it is.
    pub prefix: Option<PathBuf>,
    /// File descriptor of the detached mount that holds `guest_files`, as numbered on entry.
    pub guest: i32,
    /// What there is in that mount.
    pub guest_files: Vec<GuestFile>,
    /// File descriptors that it inherits, as numbered on entry.
    pub fds: Vec<i32>,
    /// Its resource limits.
    pub limits: Limits,
}

/// Resource limits of the jailed process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Largest file, memfds included, in bytes.
    pub file_size: u64,
    /// Open files.
    pub open_files: u64,
    /// Threads.
    pub threads: u64,
}

impl Limits {
    /// What QEMU needs for this VM.
    #[must_use]
    pub fn for_vm(spec: &VmSpec) -> Self {
        /// QEMU's event descriptors for a handful of devices, with room.
        const OPEN_FILES: u64 = 512;
        /// QEMU's own threads: main, RCU, up to 64 for block and file work.
        const THREADS: u64 = 96;
        Self {
            file_size: spec.memory().bytes(),
            open_files: OPEN_FILES,
            threads: THREADS + u64::from(spec.vcpus().get()),
        }
    }
}

/// The installation that a QEMU outside `/usr` belongs to: `/opt/qemu` of `/opt/qemu/bin/qemu-system-x86_64`.
#[must_use]
pub fn prefix_outside_usr(program: &Path) -> Option<PathBuf> {
    let dir = program.parent()?;
    if dir.starts_with("/usr") {
        return None;
    }
    let prefix = if dir.ends_with("bin") { dir.parent()? } else { dir };
    Some(prefix.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_qemu_outside_usr_adds_its_prefix() {
        for (program, want) in [
            ("/usr/bin/qemu-system-x86_64", None),
            ("/usr/local/bin/qemu-system-x86_64", None),
            ("/opt/qemu/bin/qemu-system-x86_64", Some("/opt/qemu")),
            ("/srv/build/qemu-system-x86_64", Some("/srv/build")),
        ] {
            assert_eq!(prefix_outside_usr(Path::new(program)), want.map(PathBuf::from));
        }
    }
}
