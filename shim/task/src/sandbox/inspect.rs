//! What `vmctr inspect` shows of a container.

use std::fs;

use tokio::task::spawn_blocking;
use vmctr_proto::GuestCid;
use vmctr_proto::control::{HostProcess, InspectReply, Phase, Task};

use super::container::Container;
use super::request::no_container;
use super::session::Session;
use super::share::describe;
use super::steps::Steps;
use crate::error::{Result, TaskError};

/// What the driver knows.
pub fn facts(container: &Container) -> InspectReply {
    let owner = container.hook_state("");
    let mut reply = InspectReply {
        namespace: container.namespace().to_owned(),
        container_id: owner.id,
        bundle: owner.bundle.display().to_string(),
        vm_state: "Stopped".to_owned(),
        tasks: tasks(container),
        ..InspectReply::default()
    };
    if let Some(session) = container.session() {
        vm_facts(&mut reply, session, container.steps());
    }
    reply
}

fn vm_facts(reply: &mut InspectReply, session: &Session, steps: &Steps) {
    let vm = session.vm();
    reply.vm_state = vm.state().borrow().to_string();
    reply.accelerator = vm.accelerator().to_string();
    reply.machine = vm.spec().machine().as_str().to_owned();
    reply.vcpus = vm.spec().vcpus().get();
    reply.memory_bytes = vm.spec().memory().bytes();
    reply.guest_cid = GuestCid::DEFAULT.into();
    reply.guest_kernel = session.guest_kernel().to_owned();
    reply.agent_version = vm.hello().agent_version.clone();
    reply.qemu_version = session.qemu().version().to_string();
    reply.shares = describe(session.share_spec());
    reply.phases = steps
        .done()
        .iter()
        .map(|step| Phase {
            name: step.name.to_owned(),
            micros: u64::try_from(step.duration.as_micros()).unwrap_or(u64::MAX),
        })
        .collect();
    reply.processes = [("shim", std::process::id()), ("qemu", session.pid()), ("fsd", session.share_pid())]
        .map(|(role, pid)| HostProcess { role: role.to_owned(), pid, pss_bytes: 0 })
        .to_vec();
}

fn tasks(container: &Container) -> Vec<Task> {
    let task = |(exec_id, task): (&String, &super::task::Task)| Task {
        exec_id: exec_id.clone(),
        state: task.process.phase().name().to_owned(),
        guest_pid: task.guest_pid,
    };
    container.tasks().iter().map(task).collect()
}

/// Adds what the processes use.
pub async fn inspect(facts: Option<InspectReply>) -> Result<InspectReply> {
    let mut reply = facts.ok_or_else(no_container)?;
    let measured = spawn_blocking(move || {
        for process in &mut reply.processes {
            process.pss_bytes = pss(process.pid);
        }
        reply
    });
    measured.await.map_err(|error| TaskError::internal("Cannot measure the processes", &error))
}

/// Proportional set size; 0 when it cannot be read.
fn pss(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    parse_pss(&text).unwrap_or_default()
}

fn parse_pss(text: &str) -> Option<u64> {
    const KIB: u64 = 1024;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(KIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proportional_set_size_is_found() {
        let text = "00400000-7ffd ---p 0 00:00 0  [rollup]\nRss:  900 kB\nPss:  123 kB\nPss_Anon: 9 kB\n";
        assert_eq!(parse_pss(text), Some(123 * 1024));
        assert_eq!(parse_pss("Rss: 1 kB\n"), None);
        assert!(pss(std::process::id()) > 0);
        assert_eq!(pss(u32::MAX), 0);
    }
}
