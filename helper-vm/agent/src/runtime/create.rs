//! Builds a container: its root, then its init process, which waits for the start.

use std::fs;

use anyhow::Context;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use pathrs::Root;
use prost::Message;
use rustix::process::Pid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use vmctr_proto::guest_paths::SHARE_DIR;

use super::payload::Payload;
use super::report::Reporter;
use super::seccomp::Confinement;
use super::{Job, ROOT_FILE, STATE_DIR, console_socket, container_dir, mount_points};
use crate::rootfs::{self, Form, ROOTFS, RootPlan};
use crate::spec::has_network;

/// Builds the container whose directory PID 1 has filled; returns its init process.
pub fn create(job: &Job, reporter: Reporter) -> anyhow::Result<Pid> {
    let dir = container_dir(&job.container);
    let root = fs::read(dir.join(ROOT_FILE)).context(ROOT_FILE)?;
    let plan = RootPlan::parse(Some(&vmctr_proto::agent::Root::decode(root.as_slice())?))?;
    rootfs::build(&plan, Form::Layer, Path::new(SHARE_DIR), &dir).context("building the root file system")?;
    mount_points::settle(&dir)?;
    let spec = Spec::load(dir.join("config.json"))?;
    make_working_directory(&dir, &spec)?;
    super::leave_agents_protection()?;
    let container = ContainerBuilder::new(job.container.clone(), SyscallType::default())
        .with_root_path(STATE_DIR)?
        .with_executor(Payload::new(reporter, Confinement::default()))
        .with_console_socket(job.terminal.then(|| console_socket(&job.container, &job.process)))
        .as_init(&dir)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    let pid =
        container.pid().and_then(|pid| Pid::from_raw(pid.as_raw())).context("the init process is gone")?;
    if !has_network(&spec) {
        loopback_up(pid).context("bringing up the container's loopback interface")?;
    }
    Ok(pid)
}

/// Creates `process.cwd` where the image lacks it, as other runtimes do; below a mount there is nothing to
/// see yet. On a read-only root, entering the directory fails by itself.
fn make_working_directory(dir: &Path, spec: &Spec) -> anyhow::Result<()> {
    let Some(process) = spec.process() else { return Ok(()) };
    let cwd = process.cwd();
    if cwd == Path::new("/") {
        return Ok(());
    }
    if spec.mounts().iter().flatten().any(|mount| cwd.starts_with(mount.destination())) {
        return Ok(());
    }
    let root = Root::open(dir.join(ROOTFS))?;
    let Ok(found) = root.resolve(cwd) else {
        // What is wrong with it, entering it will say.
        let _ = root.mkdir_all(cwd, &fs::Permissions::from_mode(0o755));
        return Ok(());
    };
    let is_dir = fs::File::from(OwnedFd::from(found)).metadata()?.is_dir();
    anyhow::ensure!(is_dir, "process.cwd {cwd:?} is not a directory");
    Ok(())
}

/// A new network namespace's loopback interface is down. The calling process moves into the namespace.
fn loopback_up(init: Pid) -> anyhow::Result<()> {
    let namespace = fs::File::open(format!("/proc/{}/ns/net", init.as_raw_nonzero()))?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(crate::sys::loopback_up()?)
}
