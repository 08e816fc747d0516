//! What of the runtime spec cannot hold in a VM, refused by name.

use std::path::{Component, Path};

use libcontainer::oci_spec::runtime::{Linux, LinuxNamespaceType, Mount, Spec};
use vmctr_proto::guest_paths::SHARE_DIR;

use super::{Error, Result, devices, resources};

/// Namespaces without which a container would share the host's, which a VM does not have.
const NEEDED: [(LinuxNamespaceType, &str); 5] = [
    (LinuxNamespaceType::Pid, "host PID namespace"),
    (LinuxNamespaceType::Network, "host network"),
    (LinuxNamespaceType::Ipc, "host IPC namespace"),
    (LinuxNamespaceType::Uts, "host UTS namespace"),
    (LinuxNamespaceType::Mount, "host mount namespace"),
];

/// File systems that the guest's kernel makes up without a device.
const FILE_SYSTEMS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

const HOST_SHARED: &str = "a container in a VM has a kernel of its own and cannot share the host's";
const NEEDS_HOST: &str = "it acts on the host, which a container in a VM does not see";

fn refused<T>(what: impl Into<String>, why: &'static str) -> Result<T> {
    Err(Error::Refused { what: what.into(), why })
}

/// Refuses what cannot hold.
pub fn check(spec: &Spec, cpus: usize) -> Result<()> {
    if spec.hooks().is_some() {
        return refused("hooks", NEEDS_HOST);
    }
    if spec.windows().is_some() || spec.solaris().is_some() || spec.vm().is_some() {
        return refused("windows, solaris or vm", "the guest is Linux and configured by the host");
    }
    spec.mounts().iter().flatten().try_for_each(mount)?;
    let linux = spec.linux().as_ref().ok_or(Error::Missing("linux"))?;
    namespaces(linux)?;
    host_objects(linux)?;
    devices::check(linux.devices().as_deref().unwrap_or_default())?;
    linux.resources().iter().try_for_each(|limits| resources::check(limits, cpus))
}

fn namespaces(linux: &Linux) -> Result<()> {
    let listed = linux.namespaces().as_deref().unwrap_or_default();
    let has = |kind| listed.iter().any(|namespace| namespace.typ() == kind);
    if let Some((_, name)) = NEEDED.iter().find(|(kind, _)| !has(*kind)) {
        return refused(format!("linux.namespaces: {name}"), HOST_SHARED);
    }
    if has(LinuxNamespaceType::User) || linux.uid_mappings().is_some() || linux.gid_mappings().is_some() {
        return refused(
            "linux.namespaces: user",
            "user namespaces are not supported; the VM is the boundary",
        );
    }
    Ok(())
}

fn host_objects(linux: &Linux) -> Result<()> {
    if linux.intel_rdt().is_some() {
        return refused("linux.intelRdt", NEEDS_HOST);
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return refused("linux.netDevices", NEEDS_HOST);
    }
    if linux.seccomp().as_ref().is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return refused("linux.seccomp.listenerPath", NEEDS_HOST);
    }
    Ok(())
}

fn mount(mount: &Mount) -> Result<()> {
    let name = || format!("mounts: {}", mount.destination().display());
    if mount.uid_mappings().is_some()
        || mount.gid_mappings().is_some()
        || has_option(mount, "idmap", "ridmap")
    {
        return refused(name(), "ID-mapped mounts are not supported");
    }
    if mount.typ().as_deref() == Some("bind") || has_option(mount, "bind", "rbind") {
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        return if in_share(source) {
            Ok(())
        } else {
            refused(name(), "its source is not in the share that the host gave to this VM")
        };
    }
    match mount.typ().as_deref() {
        Some(kind) if FILE_SYSTEMS.contains(&kind) => Ok(()),
        kind => refused(
            format!("{} of type {:?}", name(), kind.unwrap_or_default()),
            "only bind, proc, sysfs, tmpfs, devpts, mqueue and cgroup mounts work in the VM",
        ),
    }
}

fn has_option(mount: &Mount, one: &str, other: &str) -> bool {
    mount.options().iter().flatten().any(|option| option == one || option == other)
}

fn in_share(source: &Path) -> bool {
    source.strip_prefix(SHARE_DIR).is_ok_and(|rest| {
        rest.components().next().is_some()
            && rest.components().all(|part| matches!(part, Component::Normal(_)))
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{base, parse};
    use serde_json::{Value, json};

    fn refusal(change: impl FnOnce(&mut Value)) -> String {
        let mut value = base();
        change(&mut value);
        parse(&value).unwrap_err().to_string()
    }

    #[test]
    fn the_hosts_namespaces_are_refused_by_name() {
        for (kind, name) in
            [("network", "host network"), ("pid", "host PID"), ("uts", "host UTS"), ("ipc", "host IPC")]
        {
            let text = refusal(|spec| {
                let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.retain(|namespace| namespace["type"] != kind);
            });
            assert!(text.contains(name), "{text}");
        }
        let text = refusal(|spec| {
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        });
        assert!(text.contains("user namespaces"), "{text}");
    }

    #[test]
    fn what_acts_on_the_host_is_refused_by_name() {
        let hook = json!({ "prestart": [{ "path": "/bin/true" }] });
        assert!(refusal(|spec| spec["hooks"] = hook).starts_with("hooks"));
        assert!(refusal(|spec| spec["linux"]["intelRdt"] = json!({})).contains("intelRdt"));
        let seccomp = json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x" });
        assert!(refusal(|spec| spec["linux"]["seccomp"] = seccomp).contains("listenerPath"));
    }

    #[test]
    fn mounts_come_from_the_share_or_the_kernel() {
        for (bad, word) in [
            (json!({ "destination": "/d", "type": "bind", "source": "/etc" }), "not in the share"),
            (
                json!({ "destination": "/d", "source": "/run/vmctr/share/../x", "options": ["rbind"] }),
                "not in the share",
            ),
            (
                json!({ "destination": "/d", "type": "bind", "source": "/run/vmctr/share" }),
                "not in the share",
            ),
            (json!({ "destination": "/d", "type": "nfs", "source": "a:/b" }), "\"nfs\""),
            (
                json!({ "destination": "/d", "type": "bind", "source": "/run/vmctr/share/vol/0", "options": ["idmap"] }),
                "ID-mapped",
            ),
        ] {
            let text = refusal(|spec| spec["mounts"] = json!([bad]));
            assert!(text.contains("/d") && text.contains(word), "{text}");
        }
        let mut value = base();
        value["mounts"] = json!([
            { "destination": "/d", "type": "bind", "source": "/run/vmctr/share/vol/0", "options": ["rbind", "ro"] },
            { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"] }
        ]);
        parse(&value).unwrap();
    }
}
