//! `vmctr ps`: one line per VM of the namespace.

use serde::Serialize;

use super::{Context, config};
use crate::failure::{Outcome, Verdict};
use crate::output;
use crate::vms::{self, Vm};

/// One VM as it is printed. What only its shim knows is absent when the shim does not answer.
#[derive(Serialize)]
struct Row {
    container: String,
    /// The VM's state; `dead` when its shim is gone, `silent` when the shim does not answer.
    state: String,
    qemu_pid: Option<u32>,
    accelerator: Option<String>,
    vcpus: Option<u32>,
    memory_bytes: Option<u64>,
    uptime_seconds: Option<u64>,
}

/// Prints the VMs.
pub async fn run(context: &Context) -> Outcome {
    let vms = vms::list(&config()?.run_dir, &context.namespace).await?;
    let rows: Vec<_> = vms.into_iter().map(Row::from).collect();
    if context.json {
        output::json(&rows)?;
    } else {
        output::print_line(&text(&rows))?;
    }
    Ok(Verdict::Good)
}

impl From<Vm> for Row {
    fn from(vm: Vm) -> Self {
        let reply = vm.reply.ok();
        let state = match &reply {
            Some(reply) => reply.vm_state.to_lowercase(),
            None if vm.alive => "silent".to_owned(),
            None => "dead".to_owned(),
        };
        let qemu =
            reply.as_ref().and_then(|reply| reply.processes.iter().find(|process| process.role == "qemu"));
        Self {
            container: vm.container,
            state,
            qemu_pid: qemu.map(|qemu| qemu.pid),
            accelerator: reply.as_ref().map(|reply| reply.accelerator.clone()),
            vcpus: reply.as_ref().map(|reply| reply.vcpus),
            memory_bytes: reply.as_ref().map(|reply| reply.memory_bytes),
            uptime_seconds: vm.uptime_seconds,
        }
    }
}

fn text(rows: &[Row]) -> String {
    let header = ["CONTAINER", "STATE", "QEMU PID", "ACCEL", "CPUS", "MEMORY", "UP"];
    output::table(&header, rows.iter().map(cells))
}

fn cells(row: &Row) -> Vec<String> {
    vec![
        row.container.clone(),
        row.state.clone(),
        or_dash(row.qemu_pid),
        or_dash(row.accelerator.as_ref()),
        or_dash(row.vcpus),
        or_dash(row.memory_bytes.map(output::bytes)),
        or_dash(row.uptime_seconds.map(output::duration)),
    ]
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use vmctr_proto::control::{HostProcess, InspectReply};

    use super::*;
    use crate::control;

    fn vm(alive: bool, reply: Result<InspectReply, control::Error>) -> Row {
        Vm { container: "c".into(), alive, uptime_seconds: Some(61), reply }.into()
    }

    fn silent() -> Result<InspectReply, control::Error> {
        Err(control::Error::Silent { socket: "/s".into(), patience: std::time::Duration::ZERO })
    }

    #[test]
    fn a_running_vm_shows_its_figures() {
        let process = |role: &str, pid| HostProcess { role: role.into(), pid, pss_bytes: 0 };
        let row = vm(
            true,
            Ok(InspectReply {
                vm_state: "Running".into(),
                accelerator: "tcg".into(),
                vcpus: 2,
                memory_bytes: 512 << 20,
                processes: vec![process("shim", 1), process("qemu", 2)],
                ..InspectReply::default()
            }),
        );
        assert_eq!(cells(&row), ["c", "running", "2", "tcg", "2", "512 MiB", "1m1s"]);
    }

    #[test]
    fn a_shim_that_is_gone_differs_from_one_that_is_stuck() {
        assert_eq!(cells(&vm(false, silent()))[..3], ["c", "dead", "-"]);
        assert_eq!(cells(&vm(true, silent()))[..3], ["c", "silent", "-"]);
    }
}
