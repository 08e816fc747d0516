//! What it was measured on, as facts for the results.

use std::fs;
use std::process::Command;
use std::thread;

use serde_json::Value;
use vmctr_tests::rig::{Rig, command, prerequisites};

use super::table::fact;

type Facts = Vec<(&'static str, Value)>;

/// Host and programs.
pub fn facts() -> Facts {
    let cores = thread::available_parallelism().map_or(0, usize::from);
    vec![
        ("date", fact(said(Command::new("date").args(["--utc", "+%Y-%m-%dT%H:%M:%SZ"])))),
        ("cpu", fact(cpu(&read("/proc/cpuinfo")))),
        ("cores", cores.into()),
        ("memory_mib", memory_mib(&read("/proc/meminfo")).into()),
        ("load_before", fact(read("/proc/loadavg").split(' ').next().unwrap_or_default())),
        ("kernel", fact(read("/proc/sys/kernel/osrelease").trim_end())),
        ("containerd", fact(said(Command::new(prerequisites::program("containerd")).arg("--version")))),
        ("runc", fact(said(Command::new(prerequisites::program("runc")).arg("--version")))),
    ]
}

/// A VM and what runs it.
pub fn vm_facts(rig: &Rig, id: &str) -> Facts {
    let view = rig.inspect(id);
    let names = ["accelerator", "machine", "vcpus", "memory_bytes", "guest_kernel", "qemu_version"];
    let shown = ["accelerator", "vm_machine", "vm_cpus", "vm_memory_bytes", "vm_kernel", "qemu"]
        .into_iter()
        .zip(names);
    shown.map(|(shown, name)| (shown, view[name].clone())).collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A command's first line.
fn said(command: &mut Command) -> String {
    command::run(command).ok().text().lines().next().unwrap_or_default().to_owned()
}

fn cpu(cpuinfo: &str) -> &str {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, name)| name)
}

fn memory_mib(meminfo: &str) -> u64 {
    const KIB_PER_MIB: u64 = 1024;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() / KIB_PER_MIB
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_and_memory_are_found() {
        assert_eq!(cpu("processor\t: 0\nmodel name\t: Some CPU @ 2.60GHz\n"), "Some CPU @ 2.60GHz");
        assert_eq!(cpu(""), "unknown");
        assert_eq!(memory_mib("MemTotal:        2048000 kB\nMemFree: 1 kB\n"), 2000);
        assert_eq!(memory_mib(""), 0);
    }
}
