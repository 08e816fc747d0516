//! The host's runtime spec, turned into one that holds in this guest.
//!
//! What a VM cannot give is refused by name ([`refuse`]); what the VM itself replaces is dropped here:
//! - `root.path`: the agent's own root; namespaces' `path`s: every container gets new ones, and a cgroup
//!   namespace always.
//! - AppArmor profiles and SELinux labels: the guest's kernel has no policy, the host's confines QEMU.
//! - `linux.cgroupsPath`: the guest's own hierarchy.
//!
//! Everything else reaches libcontainer as it came.

mod devices;
mod refuse;
mod resources;

use std::path::{Path, PathBuf};

use libcontainer::oci_spec::OciSpecError;
use libcontainer::oci_spec::runtime::{
    Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources, Mount, Process,
    RootBuilder, Spec,
};

use crate::cgroup::Cgroup;
use crate::rootfs::ROOTFS;

/// The spec cannot hold in this guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} is no valid JSON of the OCI runtime spec")]
    Json { what: &'static str, source: serde_json::Error },
    #[error("{what}: {why}")]
    Refused { what: String, why: &'static str },
    #[error("the runtime spec lacks {0}")]
    Missing(&'static str),
    #[error("{0} cannot be rebuilt")]
    Build(&'static str, #[source] OciSpecError),
}

type Result<T> = std::result::Result<T, Error>;

/// What is particular to the container at hand.
pub struct Place<'a> {
    /// Its control group.
    pub cgroup: &'a Cgroup,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The guest's CPUs, numbered from 0.
    pub cpus: usize,
}

/// Parses and normalises `config.json`.
pub fn container(json: &[u8], place: &Place) -> Result<Spec> {
    let mut spec: Spec =
        serde_json::from_slice(json).map_err(|source| Error::Json { what: "the spec", source })?;
    refuse::check(&spec, place.cpus)?;
    set_root(&mut spec)?;
    let process = spec.process_mut().as_mut().ok_or(Error::Missing("process"))?;
    normalise_process(process, place.terminal)?;
    let linux = spec.linux_mut().as_mut().ok_or(Error::Missing("linux"))?;
    normalise_linux(linux, place.cgroup)?;
    spec.mounts_mut().iter_mut().flatten().for_each(name_source);
    Ok(spec)
}

/// Parses and normalises the `process` object of an exec.
pub fn process(json: &[u8], terminal: bool) -> Result<Process> {
    let mut process: Process =
        serde_json::from_slice(json).map_err(|source| Error::Json { what: "the process", source })?;
    normalise_process(&mut process, terminal)?;
    Ok(process)
}

/// Parses new limits of a running container.
pub fn resources(json: &[u8], cpus: usize) -> Result<LinuxResources> {
    let resources: LinuxResources =
        serde_json::from_slice(json).map_err(|source| Error::Json { what: "linux.resources", source })?;
    resources::check(&resources, cpus)?;
    Ok(resources)
}

/// Has the container use the network namespace at this path instead of a new one, if it may: one that has no
/// namespace of its own, or one of users, whom the network would not belong to, may not.
pub fn use_network(spec: &mut Spec, path: impl FnOnce() -> Option<PathBuf>) {
    let namespaces = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut());
    let namespaces = namespaces.into_iter().flatten();
    let mut network = None;
    for namespace in namespaces {
        match namespace.typ() {
            LinuxNamespaceType::User => return,
            LinuxNamespaceType::Network => network = Some(namespace),
            _ => {}
        }
    }
    if let Some(network) = network {
        network.set_path(path());
    }
}

/// Whether its network namespace was there before it.
pub fn has_network(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
    let is_network = |namespace: &&LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network;
    namespaces.unwrap_or_default().iter().find(is_network).is_some_and(|it| it.path().is_some())
}

fn set_root(spec: &mut Spec) -> Result<()> {
    let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let root = RootBuilder::default().path(ROOTFS).readonly(read_only).build();
    spec.set_root(Some(root.map_err(|source| Error::Build("root", source))?));
    Ok(())
}

fn normalise_process(process: &mut Process, terminal: bool) -> Result<()> {
    if process.args().as_deref().unwrap_or_default().is_empty() {
        return Err(Error::Missing("process.args"));
    }
    if !process.cwd().is_absolute() {
        let what = format!("process.cwd {:?}", process.cwd());
        return Err(Error::Refused { what, why: "it must be an absolute path" });
    }
    process.set_terminal(Some(terminal)).set_apparmor_profile(None).set_selinux_label(None);
    // libcontainer takes any value, even false, for "set" and would then filter too late.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    Ok(())
}

fn normalise_linux(linux: &mut Linux, cgroup: &Cgroup) -> Result<()> {
    linux.set_cgroups_path(Some(cgroup.spec_path())).set_mount_label(None);
    let namespaces = linux.namespaces_mut().get_or_insert_default();
    namespaces.iter_mut().for_each(|namespace| {
        namespace.set_path(None);
    });
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup) {
        let cgroup = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Cgroup).build();
        namespaces.push(cgroup.map_err(|source| Error::Build("linux.namespaces", source))?);
    }
    Ok(())
}

/// libcontainer wants a source even where the kernel ignores it.
fn name_source(mount: &mut Mount) {
    if mount.source().as_deref().is_none_or(|source| source == Path::new("")) {
        let kind = mount.typ().clone().unwrap_or_else(|| "none".to_owned());
        mount.set_source(Some(kind.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A small spec as containerd writes it.
    pub(super) fn base() -> serde_json::Value {
        json!({
            "ociVersion": "1.1.0",
            "process": {
                "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/",
                "apparmorProfile": "docker-default", "noNewPrivileges": false
            },
            "root": { "path": "/host/rootfs", "readonly": true },
            "mounts": [ { "destination": "/proc", "type": "proc" } ],
            "linux": {
                "cgroupsPath": "/default/x", "mountLabel": "system_u",
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                    { "type": "network", "path": "/run/netns/x" }
                ]
            }
        })
    }

    pub(super) fn parse(value: &serde_json::Value) -> Result<Spec> {
        let cgroup = Cgroup::of("c1");
        container(value.to_string().as_bytes(), &Place { cgroup: &cgroup, terminal: true, cpus: 2 })
    }

    #[test]
    fn what_the_vm_replaces_is_dropped_and_the_rest_is_kept() {
        let spec = parse(&base()).unwrap();
        let root = spec.root().as_ref().unwrap();
        assert_eq!((root.path().as_path(), root.readonly()), (Path::new(ROOTFS), Some(true)));
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.apparmor_profile(), &None);
        assert_eq!(process.no_new_privileges(), None);
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/vmctr/c1")));
        assert_eq!(linux.mount_label(), &None);
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(namespaces.iter().all(|namespace| namespace.path().is_none()));
        assert_eq!(namespaces.last().unwrap().typ(), LinuxNamespaceType::Cgroup);
        assert_eq!(spec.mounts().as_ref().unwrap()[0].source().as_deref(), Some(Path::new("proc")));
    }

    #[test]
    fn only_a_container_with_a_network_and_the_guests_users_takes_one_that_is_there() {
        let network = || Some(PathBuf::from("/proc/1/fd/9"));
        let with = |namespaces: &[&str]| {
            let mut value = base();
            value["linux"]["namespaces"] = namespaces.iter().map(|typ| json!({ "type": typ })).collect();
            let mut spec: Spec = serde_json::from_value(value).unwrap();
            use_network(&mut spec, network);
            has_network(&spec)
        };
        assert!(with(&["pid", "network", "mount"]));
        assert!(!with(&["pid", "mount"]));
        assert!(!with(&["network", "user"]));
        let mut spec = parse(&base()).unwrap();
        use_network(&mut spec, || None);
        assert!(!has_network(&spec));
    }

    #[test]
    fn a_process_needs_a_program_and_an_absolute_directory() {
        let mut value = base();
        value["process"]["args"] = json!([]);
        assert!(matches!(parse(&value), Err(Error::Missing("process.args"))));
        value["process"]["args"] = json!(["true"]);
        value["process"]["cwd"] = json!("tmp");
        assert!(parse(&value).unwrap_err().to_string().contains("process.cwd"));
        assert!(matches!(process(b"{", false), Err(Error::Json { .. })));
    }
}
