//! Runs a further process in a started container.

use std::fs;
use std::path::Path;

use anyhow::Context;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::{Process, Spec};
use libcontainer::syscall::syscall::SyscallType;
use rustix::process::Pid;

use super::payload::Payload;
use super::report::Reporter;
use super::seccomp::Confinement;
use super::{Job, STATE_DIR, console_socket, container_dir, process_file};
use crate::cgroup::Cgroup;

/// Runs the process that PID 1 described; returns it once it executes its program.
pub fn exec(job: &Job, reporter: Reporter) -> anyhow::Result<Pid> {
    let spec = Spec::load(container_dir(&job.container).join("config.json"))?;
    let file = process_file(&job.container, &job.process);
    let mut process: Process = serde_json::from_slice(&fs::read(&file)?)?;
    let confinement = confine(&mut process, &spec);
    fs::write(&file, serde_json::to_vec(&process)?)?;
    super::leave_agents_protection()?;
    let pid = ContainerBuilder::new(job.container.clone(), SyscallType::default())
        .with_root_path(STATE_DIR)?
        .with_executor(Payload::new(reporter, confinement))
        .with_console_socket(job.terminal.then(|| console_socket(&job.container, &job.process)))
        .as_tenant()
        .with_process(Some(&file))
        .with_sub_cgroup(sub_group(&job.container)?)
        .with_detach(true)
        .build()?;
    Pid::from_raw(pid.as_raw()).context("the process has no number")
}

/// The group of the init process below the container's, if it moved: one that manages groups itself leaves
/// its own empty of processes, and none can be added there.
fn sub_group(container: &str) -> anyhow::Result<Option<String>> {
    let stored = Container::load(Path::new(STATE_DIR).join(container))?;
    let init = stored.pid().context("the container has no init process")?;
    let groups = fs::read_to_string(format!("/proc/{init}/cgroup"))?;
    Ok(below(&groups, &Cgroup::of(container).spec_path()))
}

/// What a line of /proc/PID/cgroup names below `base`.
fn below(groups: &str, base: &Path) -> Option<String> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let rest = Path::new(path).strip_prefix(base).ok()?.to_str()?;
    (!rest.is_empty()).then(|| rest.to_owned())
}

/// Takes over from libcontainer what must happen right before the program runs. What the process leaves
/// open it has from its container.
fn confine(process: &mut Process, spec: &Spec) -> Confinement {
    let container = spec.process().as_ref();
    let capabilities = process.capabilities().clone();
    let capabilities = capabilities.or_else(|| container.and_then(|init| init.capabilities().clone()));
    if process.rlimits().is_none() {
        process.set_rlimits(container.and_then(|init| init.rlimits().clone()));
    }
    process.set_capabilities(None);
    Confinement {
        seccomp: spec.linux().as_ref().and_then(|linux| linux.seccomp().clone()),
        capabilities,
        no_new_privileges: process.no_new_privileges() == Some(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::{
        Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxSeccompBuilder, ProcessBuilder, SpecBuilder,
    };

    #[test]
    fn an_exec_follows_an_init_that_moved() {
        let base = Path::new("/vmctr/c1");
        assert_eq!(below("0::/vmctr/c1\n", base), None);
        assert_eq!(below("0::/vmctr/c1/init.scope\n", base), Some("init.scope".to_owned()));
        assert_eq!(below("0::/vmctr/c12/x\n", base), None);
    }

    #[test]
    fn an_exec_has_the_containers_filter_and_falls_back_to_its_capabilities() {
        let bounding = [Capability::Chown].into_iter().collect::<std::collections::HashSet<_>>();
        let capabilities = LinuxCapabilitiesBuilder::default().bounding(bounding).build().unwrap();
        let init = ProcessBuilder::default().capabilities(capabilities.clone()).build().unwrap();
        let seccomp = LinuxSeccompBuilder::default().build().unwrap();
        let linux = LinuxBuilder::default().seccomp(seccomp.clone()).build().unwrap();
        let spec = SpecBuilder::default().process(init.clone()).linux(linux).build().unwrap();

        let mut process = ProcessBuilder::default().no_new_privileges(true).build().unwrap();
        process.set_capabilities(None).set_rlimits(None);
        let confinement = confine(&mut process, &spec);
        assert_eq!(confinement.capabilities, Some(capabilities));
        assert_eq!(confinement.seccomp, Some(seccomp));
        assert!(confinement.no_new_privileges);
        assert_eq!(process.rlimits(), init.rlimits());
        assert!(process.capabilities().is_none());
    }
}
