//! `vmctr inspect ID`: all that a container's shim tells about its VM.

use serde::Serialize;
use vmctr_proto::control::{HostProcess, InspectReply, Phase, Share, Task};

use super::{Context, config};
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;
use crate::vms;

/// Prints the VM of the container.
pub async fn run(context: &Context, id: &str) -> Outcome {
    let run_dir = config()?.run_dir;
    let vms = vms::list(&run_dir, &context.namespace).await?;
    let vm = vms.into_iter().find(|vm| vm.container == id).ok_or_else(|| missing(context, id))?;
    let reply = vm.reply.map_err(|error| {
        Failure::failed(error).hint(format!(
            "the shim of {id} is gone or stuck; `ctr -n {} task delete --force {id}` cleans up",
            context.namespace
        ))
    })?;
    print(context, reply)?;
    Ok(Verdict::Good)
}

fn missing(context: &Context, id: &str) -> Failure {
    let error = anyhow::anyhow!("No VM of a container {id} in namespace {}", context.namespace);
    Failure::not_found(error).hint("`vmctr -n NAMESPACE ps` lists the VMs of a namespace")
}

fn print(context: &Context, reply: InspectReply) -> anyhow::Result<()> {
    if context.json { output::json(&View::from(reply)) } else { output::print_line(&text(&reply)) }
}

/// The reply as JSON: the names are part of the CLI's contract, not of the protocol's.
#[derive(Serialize)]
struct View {
    namespace: String,
    container: String,
    bundle: String,
    state: String,
    accelerator: String,
    machine: String,
    vcpus: u32,
    memory_bytes: u64,
    guest_cid: u32,
    guest_kernel: String,
    agent_version: String,
    qemu_version: String,
    processes: Vec<ProcessView>,
    shares: Vec<ShareView>,
    phases: Vec<PhaseView>,
    tasks: Vec<TaskView>,
}

#[derive(Serialize)]
struct ProcessView {
    role: String,
    pid: u32,
    pss_bytes: u64,
}

#[derive(Serialize)]
struct ShareView {
    name: String,
    source: String,
    read_only: bool,
}

#[derive(Serialize)]
struct PhaseView {
    name: String,
    micros: u64,
}

#[derive(Serialize)]
struct TaskView {
    /// Absent for the container's first process.
    #[serde(skip_serializing_if = "String::is_empty")]
    exec: String,
    state: String,
    guest_pid: u32,
}

impl From<InspectReply> for View {
    fn from(reply: InspectReply) -> Self {
        Self {
            namespace: reply.namespace,
            container: reply.container_id,
            bundle: reply.bundle,
            state: reply.vm_state,
            accelerator: reply.accelerator,
            machine: reply.machine,
            vcpus: reply.vcpus,
            memory_bytes: reply.memory_bytes,
            guest_cid: reply.guest_cid,
            guest_kernel: reply.guest_kernel,
            agent_version: reply.agent_version,
            qemu_version: reply.qemu_version,
            processes: reply.processes.into_iter().map(Into::into).collect(),
            shares: reply.shares.into_iter().map(Into::into).collect(),
            phases: reply.phases.into_iter().map(Into::into).collect(),
            tasks: reply.tasks.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<HostProcess> for ProcessView {
    fn from(process: HostProcess) -> Self {
        Self { role: process.role, pid: process.pid, pss_bytes: process.pss_bytes }
    }
}

impl From<Share> for ShareView {
    fn from(share: Share) -> Self {
        Self { name: share.name, source: share.source, read_only: share.read_only }
    }
}

impl From<Phase> for PhaseView {
    fn from(phase: Phase) -> Self {
        Self { name: phase.name, micros: phase.micros }
    }
}

impl From<Task> for TaskView {
    fn from(task: Task) -> Self {
        Self { exec: task.exec_id, state: task.state, guest_pid: task.guest_pid }
    }
}

fn text(reply: &InspectReply) -> String {
    [
        machine(reply),
        section("Host processes", &["ROLE", "PID", "MEMORY (PSS)"], reply.processes.iter().map(process_row)),
        section("Shares", &["NAME", "ACCESS", "SOURCE"], reply.shares.iter().map(share_row)),
        section("Start phases", &["PHASE", "TIME"], reply.phases.iter().map(phase_row)),
        section("Tasks", &["EXEC", "STATE", "PID IN GUEST"], reply.tasks.iter().map(task_row)),
    ]
    .join("\n\n")
}

fn machine(reply: &InspectReply) -> String {
    let cpus = if reply.vcpus == 1 { "CPU" } else { "CPUs" };
    let hardware =
        format!("{}, {} {cpus}, {}", reply.machine, reply.vcpus, output::bytes(reply.memory_bytes));
    output::pairs([
        ("Container", format!("{} (namespace {})", reply.container_id, reply.namespace)),
        ("State", reply.vm_state.clone()),
        ("Accelerator", reply.accelerator.clone()),
        ("Machine", hardware),
        ("Guest kernel", reply.guest_kernel.clone()),
        ("Agent", reply.agent_version.clone()),
        ("QEMU", reply.qemu_version.clone()),
        ("vsock CID", reply.guest_cid.to_string()),
        ("Bundle", reply.bundle.clone()),
    ])
}

fn section(title: &str, header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    format!("{title}\n{}", output::table(header, rows))
}

fn process_row(process: &HostProcess) -> Vec<String> {
    let memory = if process.pss_bytes == 0 { "unknown".to_owned() } else { output::bytes(process.pss_bytes) };
    vec![process.role.clone(), process.pid.to_string(), memory]
}

fn share_row(share: &Share) -> Vec<String> {
    let access = if share.read_only { "ro" } else { "rw" };
    vec![share.name.clone(), access.to_owned(), share.source.clone()]
}

fn phase_row(phase: &Phase) -> Vec<String> {
    vec![phase.name.clone(), format!("{}.{:03} ms", phase.micros / 1000, phase.micros % 1000)]
}

fn task_row(task: &Task) -> Vec<String> {
    let exec = if task.exec_id.is_empty() { "-" } else { &task.exec_id };
    vec![exec.to_owned(), task.state.clone(), task.guest_pid.to_string()]
}
