//! The bundle's `config.json`: read once, checked once, turned into what the guest gets.
//!
//! ```text
//!   config.json -> OciSpec::load      well-formed, and nothing in it that cannot hold in a VM (refuse)
//!                    .limits()        size of the VM
//!                    .hooks()         programs that run on the host
//!                    .for_guest()     bind mounts point into the share (volumes), host-only parts taken out
//! ```
//!
//! The document stays JSON between host and agent: what neither knows passes unchanged, nothing is lost in
//! a conversion.

mod refuse;
mod volumes;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hooks, LinuxResources, Process, Spec};
use serde_json::{Value, json};
use vmctr_vmm::spec::Limits;

pub use refuse::Refusal;
pub use volumes::{Volume, VolumeError};

const CONFIG_FILE: &str = "config.json";

/// The spec cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// No readable file.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Not what the OCI runtime spec describes.
    #[error("{what} is not what the OCI runtime spec describes")]
    Malformed {
        /// The document.
        what: String,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// Well-formed, but it cannot hold in a VM.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A bind mount cannot be shared.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// A spec that can hold in a VM.
#[derive(Clone, Debug)]
pub struct OciSpec {
    json: Value,
    spec: Spec,
    bundle: PathBuf,
}

/// What the guest gets of a spec, and what the host must share for it.
#[derive(Debug)]
pub struct GuestSpec {
    /// `config.json` for the agent.
    pub json: Vec<u8>,
    /// Sources of bind mounts: `vol/N` of the share is entry N.
    pub volumes: Vec<Volume>,
}

impl OciSpec {
    /// Reads and checks the bundle's spec.
    pub fn load(bundle: &Path) -> Result<Self, OciError> {
        let path = bundle.join(CONFIG_FILE);
        let bytes = fs::read(&path).map_err(|source| OciError::Read { path: path.clone(), source })?;
        Self::parse(&bytes, bundle)
    }

    fn parse(bytes: &[u8], bundle: &Path) -> Result<Self, OciError> {
        let what = || bundle.join(CONFIG_FILE).display().to_string();
        let json: Value =
            serde_json::from_slice(bytes).map_err(|source| OciError::Malformed { what: what(), source })?;
        let spec: Spec = serde_json::from_value(json.clone())
            .map_err(|source| OciError::Malformed { what: what(), source })?;
        refuse::check_spec(&json, &spec)?;
        Ok(Self { json, spec, bundle: bundle.to_owned() })
    }

    /// The container's annotations.
    pub fn annotations(&self) -> HashMap<String, String> {
        self.spec.annotations().clone().unwrap_or_default()
    }

    /// Version of the OCI runtime spec.
    pub fn version(&self) -> &str {
        self.spec.version()
    }

    /// `root.path`, made absolute.
    pub fn root_path(&self) -> Option<PathBuf> {
        self.spec.root().as_ref().map(|root| self.bundle.join(root.path()))
    }

    /// Programs that run around the container.
    pub fn hooks(&self) -> Hooks {
        self.spec.hooks().clone().unwrap_or_default()
    }

    /// What sizes the VM.
    pub fn limits(&self) -> Limits {
        let resources = self.spec.linux().as_ref().and_then(|linux| linux.resources().clone());
        limits(&resources.unwrap_or_default())
    }

    /// The spec as the guest gets it, for the container with this ID.
    pub fn for_guest(&self, container_id: &str) -> Result<GuestSpec, OciError> {
        let mut json = self.json.clone();
        if self.spec.hostname().as_deref().unwrap_or_default().is_empty() {
            json["hostname"] = hostname(container_id).into();
        }
        let volumes = volumes::rewrite(&mut json, &self.bundle)?;
        if let Some(object) = json.as_object_mut() {
            object.remove("hooks");
        }
        add_cgroup_namespace(&mut json);
        Ok(GuestSpec { json: json.to_string().into_bytes(), volumes })
    }
}

/// A container without a name of its own has the host's under other runtimes; here it would have none.
fn hostname(container_id: &str) -> String {
    /// Kernel's `__NEW_UTS_LEN`.
    const MAX: usize = 64;
    container_id.chars().take(MAX).collect()
}

/// A spec without a cgroup namespace means the host's cgroups, which containerd asks for by default on hosts
/// with cgroup v1. The guest has its own cgroups either way; the container sees just its own.
fn add_cgroup_namespace(json: &mut Value) {
    let Some(list) = json.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut) else { return };
    if !list.iter().any(|namespace| namespace["type"] == "cgroup") {
        list.push(json!({"type": "cgroup"}));
    }
}

fn limits(resources: &LinuxResources) -> Limits {
    let cpu = resources.cpu().as_ref();
    Limits {
        memory: resources.memory().as_ref().and_then(|memory| memory.limit()),
        cpu_quota: cpu.and_then(|cpu| cpu.quota()),
        cpu_period: cpu.and_then(|cpu| cpu.period()),
    }
}

/// Checks the `process` object of an exec.
pub fn check_exec(bytes: &[u8]) -> Result<(), OciError> {
    let malformed = |source| OciError::Malformed { what: "The exec's process".to_owned(), source };
    let json: Value = serde_json::from_slice(bytes).map_err(malformed)?;
    serde_json::from_value::<Process>(json.clone()).map_err(malformed)?;
    Ok(refuse::check_process(&json)?)
}

/// Checks new `resources` for a container whose VM has `vm_memory` bytes.
pub fn check_update(bytes: &[u8], vm_memory: u64) -> Result<(), OciError> {
    let malformed = |source| OciError::Malformed { what: "The update's resources".to_owned(), source };
    let json: Value = serde_json::from_slice(bytes).map_err(malformed)?;
    let resources: LinuxResources = serde_json::from_value(json.clone()).map_err(malformed)?;
    Ok(refuse::check_update(&json, &limits(&resources), vm_memory)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &Value) -> Result<OciSpec, OciError> {
        OciSpec::parse(json.to_string().as_bytes(), Path::new("/bundle"))
    }

    fn minimal() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["true"]},
            "hooks": {"poststop": [{"path": "/bin/true"}]},
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
                "resources": {"memory": {"limit": 1048576}, "cpu": {"quota": 50000, "period": 100000}},
                "unheardOf": {"kept": true}
            }
        })
    }

    #[test]
    fn the_guest_gets_the_document_without_host_parts() {
        let spec = parse(&minimal()).unwrap();
        let guest: Value = serde_json::from_slice(&spec.for_guest("c1").unwrap().json).unwrap();
        assert!(guest.get("hooks").is_none());
        assert_eq!(guest["hostname"], "c1");
        assert_eq!(guest["linux"]["unheardOf"]["kept"], true);
        let types: Vec<_> =
            guest["linux"]["namespaces"].as_array().unwrap().iter().map(|ns| ns["type"].clone()).collect();
        assert_eq!(types.iter().filter(|typ| **typ == "cgroup").count(), 1);
    }

    #[test]
    fn the_parts_that_the_host_needs_are_read() {
        let spec = parse(&minimal()).unwrap();
        assert_eq!(spec.root_path(), Some("/bundle/rootfs".into()));
        assert_eq!(spec.hooks().poststop().as_ref().unwrap().len(), 1);
        let want = Limits { memory: Some(1 << 20), cpu_quota: Some(50_000), cpu_period: Some(100_000) };
        assert_eq!(spec.limits(), want);
    }

    #[test]
    fn a_broken_document_is_named() {
        let error = OciSpec::parse(b"{", Path::new("/bundle")).unwrap_err();
        assert!(error.to_string().contains("/bundle/config.json"), "{error}");
        assert!(matches!(OciSpec::load(Path::new("/nonexistent")), Err(OciError::Read { .. })));
        assert!(check_exec(b"[]").is_err());
    }
}
