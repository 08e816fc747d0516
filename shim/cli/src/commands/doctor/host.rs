//! Checks of the host itself: root, FUSE, memory.

use std::fs::{self, File};
use std::path::Path;

use nix::unistd::Uid;

use super::report::Check;
use crate::output;

/// What a VM's processes need beside the guest's RAM.
const BESIDE_RAM_MIB: u64 = 64;

/// containerd and the shim need root; so do the other checks.
pub fn root() -> Check {
    let uid = Uid::effective();
    if uid.is_root() {
        Check::ok("root", "running as root")
    } else {
        Check::fail(
            "root",
            format!("running as uid {uid}: other checks may fail only for that"),
            "sudo vmctr doctor",
        )
    }
}

/// The host's own /dev/fuse is for mounts of unions on the host; a container's share does without it.
pub fn fuse() -> Check {
    let device = Path::new("/dev/fuse");
    match File::options().read(true).write(true).open(device) {
        Ok(_) => Check::ok("FUSE", "/dev/fuse opens"),
        Err(e) => Check::warn(
            "FUSE",
            format!("/dev/fuse: {e}. Containers run without it; mounting a union on this host does not"),
            "modprobe fuse",
        ),
    }
}

/// One VM of the default size must fit into what is free.
pub fn memory(vm_mib: u64) -> Check {
    match fs::read_to_string("/proc/meminfo") {
        Ok(meminfo) => memory_from(&meminfo, vm_mib),
        Err(e) => {
            Check::fail("memory", format!("cannot read /proc/meminfo: {e}"), "mount -t proc proc /proc")
        }
    }
}

fn memory_from(meminfo: &str, vm_mib: u64) -> Check {
    let Some(available) = field_mib(meminfo, "MemAvailable:") else {
        return Check::warn("memory", "/proc/meminfo does not tell MemAvailable", "use Linux 3.14 or newer");
    };
    let need = vm_mib + BESIDE_RAM_MIB;
    let have = output::bytes(available << 20);
    if available >= need {
        return Check::ok("memory", format!("{have} free; a VM of the default size takes up to {need} MiB"));
    }
    Check::fail(
        "memory",
        format!("{have} free, but a VM of the default size takes up to {need} MiB"),
        "free memory, or lower vm.memory_mib in the configuration",
    )
}

fn field_mib(meminfo: &str, name: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    #[test]
    fn a_vm_must_fit_into_free_memory() {
        let meminfo = "MemTotal: 9999999 kB\nMemAvailable:     589824 kB\n";
        assert_eq!(memory_from(meminfo, 512).status, Status::Ok);
        assert_eq!(memory_from(meminfo, 513).status, Status::Fail);
        assert_eq!(memory_from("MemTotal: 1 kB\n", 1).status, Status::Warn);
    }
}
