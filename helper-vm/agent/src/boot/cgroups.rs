//! The guest's control groups: one for the agent, one subtree for all containers, whose limits keep the
//! agent able to run whatever the containers do.

use std::fs;
use std::io;
use std::path::Path;

use crate::cgroup::{AGENT, CONTAINERS, ROOT};

/// Memory that containers cannot take, of what is available after the boot: PID 1, its helpers, the
/// kernel's own needs. A container that fills all memory then meets its group's limit, and is named, before
/// the guest runs out.
const RESERVED_BYTES: u64 = 24 << 20;

/// Creates the groups, enables every controller for the containers and moves PID 1 out of the root.
pub fn set_up() -> io::Result<()> {
    let root = Path::new(ROOT);
    for name in [AGENT, CONTAINERS] {
        fs::create_dir(root.join(name))?;
    }
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let enable = enabling(&controllers);
    fs::write(root.join(AGENT).join("cgroup.procs"), "1")?;
    for group in [root.to_owned(), root.join(CONTAINERS)] {
        fs::write(group.join("cgroup.subtree_control"), &enable)?;
    }
    limit(&root.join(CONTAINERS))
}

fn limit(containers: &Path) -> io::Result<()> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    let available = available(&memory).ok_or_else(|| io::Error::other("/proc/meminfo lacks MemAvailable"))?;
    fs::write(containers.join("memory.max"), available.saturating_sub(RESERVED_BYTES).to_string())?;
    let threads: u64 = fs::read_to_string("/proc/sys/kernel/threads-max")?
        .trim()
        .parse()
        .map_err(|_| io::Error::other("/proc/sys/kernel/threads-max holds no number"))?;
    fs::write(containers.join("pids.max"), (threads / 10 * 9).to_string())
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

fn enabling(controllers: &str) -> String {
    controllers.split_whitespace().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn available_memory_is_in_bytes() {
        let text = "MemTotal:  100 kB\nMemFree:   1 kB\nMemAvailable:     50 kB\n";
        assert_eq!(super::available(text), Some(51200));
        assert_eq!(super::available("MemAvailable: x kB"), None);
    }

    #[test]
    fn every_available_controller_is_enabled() {
        assert_eq!(super::enabling("cpu memory pids\n"), "+cpu +memory +pids");
    }
}
