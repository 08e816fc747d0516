//! What an OCI spec may ask of a host that a VM cannot give: refused by name, never ignored.
//!
//! Most of it is a table of JSON pointers that must be absent or empty; namespaces and devices need a look
//! at their contents. The pointers also catch what the OCI crate does not know.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Spec};
use serde_json::Value;
use vmctr_vmm::spec::Limits;

/// The spec asks for something that cannot hold in a VM.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} cannot hold in a VM: {hint}")]
pub struct Refusal {
    what: String,
    hint: &'static str,
}

impl Refusal {
    fn new(what: impl Into<String>, hint: &'static str) -> Self {
        Self { what: what.into(), hint }
    }
}

/// Of the whole spec: pointer and what to do instead.
const SPEC_TABLE: &[(&str, &str)] = &[
    (
        "/hooks/createContainer",
        "the hook would have to run in the guest; use createRuntime, which runs on the host",
    ),
    (
        "/hooks/startContainer",
        "the hook would have to run in the guest; use poststart, which runs on the host",
    ),
    ("/linux/intelRdt", "the host's cache and memory bandwidth are not the guest's; remove it"),
    ("/linux/memoryPolicy", "the guest has one memory node; remove it"),
    ("/linux/mountLabel", "the guest knows no SELinux policy; remove the label"),
    ("/linux/netDevices", "the VM gets no device of the host; remove it"),
    (
        "/linux/seccomp/listenerPath",
        "a supervisor on the host cannot receive the guest's descriptors; remove it",
    ),
    ("/vm", "the VM is sized by limits and the annotations io.vmctr.*; remove the section"),
    ("/windows", "the guest is Linux"),
    ("/solaris", "the guest is Linux"),
    ("/zos", "the guest is Linux"),
];

/// Of a `process` object.
const PROCESS_TABLE: &[(&str, &str)] = &[
    ("/apparmorProfile", "the profile is the host's and the guest has none; run with apparmor=unconfined"),
    ("/selinuxLabel", "the guest knows no SELinux policy; run with label=disable"),
    ("/execCPUAffinity", "the host's CPU numbers are not the guest's; set io.vmctr.vcpus"),
];

/// Of a `resources` object.
const RESOURCES_TABLE: &[(&str, &str)] = &[
    ("/cpu/cpus", "the host's CPU numbers are not the guest's; set io.vmctr.vcpus"),
    ("/cpu/mems", "the guest has one memory node"),
    ("/cpu/realtimeRuntime", "the guest's cgroup v2 has no realtime limits"),
    ("/cpu/realtimePeriod", "the guest's cgroup v2 has no realtime limits"),
    ("/blockIO/weightDevice", "the guest has no block device of the host"),
    ("/blockIO/throttleReadBpsDevice", "the guest has no block device of the host"),
    ("/blockIO/throttleWriteBpsDevice", "the guest has no block device of the host"),
    ("/blockIO/throttleReadIOPSDevice", "the guest has no block device of the host"),
    ("/blockIO/throttleWriteIOPSDevice", "the guest has no block device of the host"),
    ("/hugepageLimits", "the guest reserves no huge pages"),
    ("/network", "the VM has no network"),
    ("/rdma", "the VM has no RDMA device"),
];

/// Fails by name on the first thing that cannot hold.
pub fn check_spec(json: &Value, spec: &Spec) -> Result<(), Refusal> {
    check_table(json, "", SPEC_TABLE)?;
    if let Some(process) = json.get("process") {
        check_process(process)?;
    }
    if let Some(resources) = json.pointer("/linux/resources") {
        check_resources(resources)?;
    }
    let Some(linux) = spec.linux() else {
        return Err(Refusal::new("A spec without a linux section", "the guest is Linux"));
    };
    check_namespaces(linux.namespaces().as_deref().unwrap_or_default())?;
    linux.devices().iter().flatten().try_for_each(check_device)
}

/// The same for the process of an exec.
pub fn check_process(process: &Value) -> Result<(), Refusal> {
    check_table(process, "/process", PROCESS_TABLE)
}

fn check_resources(resources: &Value) -> Result<(), Refusal> {
    check_table(resources, "/linux/resources", RESOURCES_TABLE)
}

/// The same for new resources of a running container: the VM keeps its size.
pub fn check_update(resources: &Value, limits: &Limits, vm_memory: u64) -> Result<(), Refusal> {
    check_resources(resources)?;
    match limits.memory.and_then(|limit| u64::try_from(limit).ok()) {
        Some(limit) if limit > vm_memory => Err(Refusal::new(
            format!("A memory limit of {limit} bytes above the running VM's {vm_memory}"),
            "start the container with a higher limit or io.vmctr.memory",
        )),
        _ => Ok(()),
    }
}

fn check_table(json: &Value, prefix: &str, table: &[(&str, &'static str)]) -> Result<(), Refusal> {
    for (pointer, hint) in table {
        if json.pointer(pointer).is_some_and(|value| !is_empty(value)) {
            return Err(Refusal::new(dotted(prefix, pointer), hint));
        }
    }
    Ok(())
}

/// `/linux/intelRdt` as users write it: `linux.intelRdt`.
fn dotted(prefix: &str, pointer: &str) -> String {
    format!("{prefix}{pointer}").trim_start_matches('/').replace('/', ".")
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_empty),
    }
}

fn check_namespaces(namespaces: &[LinuxNamespace]) -> Result<(), Refusal> {
    for (typ, hint) in [
        (
            LinuxNamespaceType::Network,
            "the VM has no part in the host's network; run without --net-host (--net none)",
        ),
        (LinuxNamespaceType::Pid, "the guest does not see the host's processes; run without --pid host"),
        (LinuxNamespaceType::Ipc, "the guest does not share the host's memory; run without --ipc host"),
        (LinuxNamespaceType::Uts, "the guest has its own host name; run without --uts host"),
        (LinuxNamespaceType::Mount, "the guest has its own mounts; add a mount namespace"),
    ] {
        if !namespaces.iter().any(|namespace| namespace.typ() == typ) {
            return Err(Refusal::new(format!("The host's {} namespace", name(typ)), hint));
        }
    }
    namespaces.iter().try_for_each(check_namespace)
}

fn check_namespace(namespace: &LinuxNamespace) -> Result<(), Refusal> {
    if namespace.typ() == LinuxNamespaceType::User {
        return Err(Refusal::new(
            "A user namespace",
            "the VM is the boundary; run without --userns and --uidmap",
        ));
    }
    let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(());
    };
    let hint = match namespace.typ() {
        LinuxNamespaceType::Network => "the VM has only a loopback device; run with --net none",
        _ => "a VM cannot join a namespace of the host or of another container",
    };
    Err(Refusal::new(format!("Joining the {} namespace {}", name(namespace.typ()), path.display()), hint))
}

/// As `config.json` writes it.
fn name(typ: LinuxNamespaceType) -> &'static str {
    match typ {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

/// Character devices that every Linux has, with the same numbers: the OCI spec's default devices.
const DEFAULT_DEVICES: [(i64, i64); 8] = [
    (1, 3), // null
    (1, 5), // zero
    (1, 7), // full
    (1, 8), // random
    (1, 9), // urandom
    (5, 0), // tty
    (5, 1), // console
    (5, 2), // ptmx
];

fn check_device(device: &LinuxDevice) -> Result<(), Refusal> {
    let known = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => {
            DEFAULT_DEVICES.contains(&(device.major(), device.minor()))
        }
        LinuxDeviceType::P => true,
        _ => false,
    };
    if known {
        return Ok(());
    }
    Err(Refusal::new(
        format!("The host's device {}", device.path().display()),
        "the VM has no devices of the host; run without --device and --privileged",
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}},
            "hooks": {"createRuntime": [{"path": "/bin/true"}]},
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}], "cpu": {"cpus": ""}},
                "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]
            }
        })
    }

    fn check(json: &Value) -> Result<(), Refusal> {
        let spec: Spec = serde_json::from_value(json.clone()).unwrap();
        check_spec(json, &spec)
    }

    /// `base` with one value put in at a pointer; missing objects on the way are made.
    fn with(pointer: &str, value: Value) -> Value {
        let mut json = base();
        let mut at = &mut json;
        for key in pointer.trim_start_matches('/').split('/') {
            at = at.as_object_mut().unwrap().entry(key).or_insert_with(|| json!({}));
        }
        *at = value;
        json
    }

    #[test]
    fn an_ordinary_spec_passes() {
        assert_eq!(check(&base()), Ok(()));
    }

    #[test]
    fn each_entry_of_the_tables_is_refused_by_its_name() {
        let tables = [("", SPEC_TABLE), ("/process", PROCESS_TABLE), ("/linux/resources", RESOURCES_TABLE)];
        for (prefix, table) in tables {
            for (pointer, _) in table {
                let mut json = json!({});
                let mut at = &mut json;
                for key in pointer.trim_start_matches('/').split('/') {
                    at = at.as_object_mut().unwrap().entry(key).or_insert_with(|| json!({}));
                }
                *at = json!("x");
                let refusal = check_table(&json, prefix, table).unwrap_err();
                assert_eq!(refusal.what, dotted(prefix, pointer));
            }
        }
    }

    #[test]
    fn tables_are_applied_to_their_part_of_the_spec() {
        for (pointer, value, what) in [
            ("/linux/mountLabel", json!("l"), "linux.mountLabel"),
            ("/process/apparmorProfile", json!("docker-default"), "process.apparmorProfile"),
            ("/linux/resources/cpu/cpus", json!("0-1"), "linux.resources.cpu.cpus"),
            ("/hooks/startContainer", json!([{"path": "/x"}]), "hooks.startContainer"),
        ] {
            assert_eq!(check(&with(pointer, value)).unwrap_err().what, what);
        }
    }

    #[test]
    fn host_and_foreign_namespaces_are_refused() {
        for typ in ["network", "pid", "ipc", "uts", "mount"] {
            let mut json = base();
            json["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != typ);
            assert_eq!(check(&json).unwrap_err().what, format!("The host's {typ} namespace"));

            let mut json = base();
            for namespace in json["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == typ {
                    namespace["path"] = json!("/proc/1/ns/x");
                }
            }
            let what = check(&json).unwrap_err().what;
            assert_eq!(what, format!("Joining the {typ} namespace /proc/1/ns/x"));
        }
    }

    #[test]
    fn devices_of_the_host_are_refused() {
        for (typ, major, minor) in [("b", 8, 0), ("c", 10, 232), ("b", 1, 3)] {
            let device = json!([{"path": "/dev/x", "type": typ, "major": major, "minor": minor}]);
            let refusal = check(&with("/linux/devices", device)).unwrap_err();
            assert_eq!(refusal.what, "The host's device /dev/x");
        }
    }

    #[test]
    fn an_update_cannot_outgrow_the_vm() {
        let limits = |memory| Limits { memory: Some(memory), ..Limits::default() };
        assert!(check_update(&json!({}), &limits(1 << 20), 1 << 20).is_ok());
        assert!(check_update(&json!({}), &limits(-1), 1 << 20).is_ok());
        assert!(check_update(&json!({}), &limits((1 << 20) + 1), 1 << 20).is_err());
        assert!(check_update(&json!({"cpu": {"cpus": "1"}}), &limits(-1), 1 << 20).is_err());
    }
}
