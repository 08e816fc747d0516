//! The VMs of this host, found by their run directories and asked through their control sockets.

use std::fs;
use std::path::Path;

use futures::future::join_all;
use nix::unistd::{SysconfVar, sysconf};
use vmctr_proto::control::InspectReply;
use vmctr_vmm::run_dir::{self, Entry, HostProcess, Role, RunDirError};

use crate::control;

/// One VM: whose it is, and what its shim says about it.
pub struct Vm {
    /// The container.
    pub container: String,
    /// Whether the shim's process runs.
    pub alive: bool,
    /// How long the shim has been running; none when it is gone.
    pub uptime_seconds: Option<u64>,
    /// The shim's answer.
    pub reply: Result<InspectReply, control::Error>,
}

/// All VMs of a namespace, in order of their containers' IDs. All shims are asked at once: one that is stuck
/// delays the answer by its time limit only.
pub async fn list(run_dir: &Path, namespace: &str) -> Result<Vec<Vm>, RunDirError> {
    let mut entries = run_dir::list(run_dir)?;
    entries.retain(|entry| entry.meta.owner.namespace == namespace);
    let mut vms = join_all(entries.into_iter().map(ask)).await;
    vms.sort_by(|a, b| a.container.cmp(&b.container));
    Ok(vms)
}

async fn ask(entry: Entry) -> Vm {
    let reply = control::inspect(&entry.control_socket()).await;
    let shim = entry.meta.live_processes().into_iter().find(|process| process.role == Role::Shim);
    Vm {
        alive: shim.is_some(),
        uptime_seconds: shim.and_then(age),
        container: entry.meta.owner.container_id,
        reply,
    }
}

/// Seconds since a process started: its start time counts clock ticks since the host's boot.
fn age(process: &HostProcess) -> Option<u64> {
    let ticks = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let seconds: u64 = uptime.split('.').next()?.parse().ok()?;
    Some(seconds.saturating_sub(process.start_time / ticks))
}

#[cfg(test)]
mod tests {
    use vmctr_vmm::run_dir::{Owner, RunDir};

    use super::*;

    #[tokio::test]
    async fn a_vm_is_listed_in_its_namespace_even_when_its_shim_is_silent() {
        let root = tempfile::tempdir().unwrap();
        let owner = Owner { namespace: "n".into(), container_id: "c".into(), bundle: "/b".into() };
        let _dir = RunDir::create(root.path(), owner).unwrap();
        assert!(list(root.path(), "other").await.unwrap().is_empty());
        let vms = list(root.path(), "n").await.unwrap();
        assert_eq!(vms.len(), 1);
        assert_eq!((vms[0].container.as_str(), vms[0].alive), ("c", true));
        assert!(matches!(vms[0].reply, Err(control::Error::Connect { .. })));
        assert!(vms[0].uptime_seconds.is_some_and(|age| age < 600));
    }
}
