//! What a template depends on, as one digest. Whatever can change what the guest finds in its memory, or what
//! QEMU makes of a saved state, is in it; a VM that differs in any of it has another key.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vmctr_proto::PROTOCOL_VERSION;

use crate::accel::Accelerator;
use crate::assets::GuestAssets;
use crate::qemu::command::{Engine, Purpose, QemuFds, arguments};
use crate::qemu::{FileId, Qemu};
use crate::run_dir::boot_id;
use crate::spec::VmSpec;

/// Name of a template: 16 hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(String);

/// Everything that goes into the digest.
#[derive(Serialize)]
struct Parts<'a> {
    format: u32,
    protocol: u32,
    /// The counter's rate and the CPU's features are the same as long as the host runs, and the guest has
    /// taken both into its memory. The rate itself is not here: two measurements of it differ a little.
    host_boot: String,
    kernel_sha256: &'a str,
    initramfs_sha256: &'a str,
    qemu: FileId,
    qemu_version: String,
    /// Memory, CPUs, machine, accelerator, kernel arguments: all that is on the command line.
    arguments: Vec<String>,
}

impl Key {
    const DIGITS: usize = 16;

    /// The key of the template for such a VM.
    ///
    /// # Errors
    /// QEMU's binary cannot be looked at.
    pub fn of(
        spec: &VmSpec,
        assets: &GuestAssets,
        qemu: &Qemu,
        accelerator: Accelerator,
    ) -> io::Result<Self> {
        Self::in_boot(boot_id(), spec, assets, qemu, accelerator)
    }

    fn in_boot(
        host_boot: String,
        spec: &VmSpec,
        assets: &GuestAssets,
        qemu: &Qemu,
        accelerator: Accelerator,
    ) -> io::Result<Self> {
        let manifest = assets.manifest();
        let parts = Parts {
            format: super::manifest::VERSION,
            protocol: PROTOCOL_VERSION,
            host_boot,
            kernel_sha256: &manifest.kernel.sha256,
            initramfs_sha256: &manifest.initramfs.sha256,
            qemu: FileId::of(qemu.path())?,
            qemu_version: qemu.version().to_string(),
            arguments: normalised_arguments(spec, accelerator),
        };
        let digest = Sha256::digest(serde_json::to_vec(&parts)?);
        Ok(Self(digest.iter().take(Self::DIGITS / 2).map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The 16 digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The command line without what differs between two starts of the same VM.
fn normalised_arguments(spec: &VmSpec, accelerator: Accelerator) -> Vec<String> {
    let engine = match accelerator {
        Accelerator::Kvm => Engine::Kvm { device: 0 },
        Accelerator::Tcg => Engine::Tcg { tsc_khz: 0 },
    };
    let fds = QemuFds { qmp: 0, console: 0, vsock: None, share: None };
    arguments(spec, engine, Purpose::Template { state: 0 }, fds)
}

/// The text is no key.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no template's key: `vmctr template ls` lists them")]
pub struct KeyError(String);

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let good = text.len() == Self::DIGITS && text.bytes().all(hex);
        if good { Ok(Self(text.to_owned())) } else { Err(KeyError(text.to_owned())) }
    }
}

impl TryFrom<String> for Key {
    type Error = KeyError;

    fn try_from(text: String) -> Result<Self, KeyError> {
        text.parse()
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::config::VmDefaults;
    use crate::fake::put_script;
    use crate::memory::MemoryMib;
    use crate::spec::{Host, Limits, Vcpus};

    fn qemu(dir: &Path, version: &str) -> Qemu {
        let path = dir.join("qemu");
        put_script(&path, &format!("#!/bin/sh\necho 'QEMU emulator version {version}'\n"));
        Qemu::at(&path).unwrap()
    }

    fn assets(dir: &Path, kernel_sha256: &str) -> GuestAssets {
        let asset = |file: &str, sha256: &str| serde_json::json!({"file": file, "size": 4, "sha256": sha256});
        let manifest = serde_json::json!({
            "version": 1, "kernel_release": "6", "kernel_source": "test", "agent_version": "0", "modules": [],
            "kernel": asset("vmlinux", kernel_sha256), "initramfs": asset("initramfs.cpio", "b"),
        });
        fs::write(dir.join("vmlinux"), b"\x7fELF").unwrap();
        fs::write(dir.join("initramfs.cpio"), b"cpio").unwrap();
        fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
        GuestAssets::open(dir).unwrap()
    }

    fn spec(memory: u32) -> VmSpec {
        let defaults = VmDefaults { memory: MemoryMib::new(memory), ..VmDefaults::default() };
        let host = Host { cpus: Vcpus::ONE, memory: MemoryMib::new(4096) };
        VmSpec::resolve(&defaults, &Limits::default(), &HashMap::<String, String>::new(), &host).unwrap()
    }

    #[test]
    fn whatever_a_template_depends_on_changes_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let ours = assets(dir.path(), "a");
        let first = qemu(dir.path(), "10.0.2");
        let key = Key::of(&spec(512), &ours, &first, Accelerator::Tcg).unwrap();
        assert_eq!(Key::of(&spec(512), &ours, &first, Accelerator::Tcg).unwrap(), key);
        assert_ne!(Key::of(&spec(256), &ours, &first, Accelerator::Tcg).unwrap(), key);
        assert_ne!(Key::of(&spec(512), &ours, &first, Accelerator::Kvm).unwrap(), key);
        let other = assets(dir.path(), "c");
        assert_ne!(Key::of(&spec(512), &other, &first, Accelerator::Tcg).unwrap(), key);
        let newer = qemu(dir.path(), "10.0.3");
        assert_ne!(Key::of(&spec(512), &ours, &newer, Accelerator::Tcg).unwrap(), key);
    }

    #[test]
    fn a_rebuilt_qemu_of_the_same_version_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let ours = assets(dir.path(), "a");
        let qemu = qemu(dir.path(), "10.0.2");
        let key = Key::of(&spec(512), &ours, &qemu, Accelerator::Tcg).unwrap();
        let file = fs::File::options().append(true).open(qemu.path()).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_ne!(Key::of(&spec(512), &ours, &qemu, Accelerator::Tcg).unwrap(), key);
    }

    /// Two hosts, or one before and after its restart, may keep their templates in one folder.
    #[test]
    fn each_boot_of_each_host_has_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, qemu) = (assets(dir.path(), "a"), qemu(dir.path(), "10.0.2"));
        let key = |boot: &str| Key::in_boot(boot.to_owned(), &spec(512), &ours, &qemu, Accelerator::Tcg);
        assert_ne!(key("one").unwrap(), key("two").unwrap());
        assert_eq!(key("one").unwrap(), key("one").unwrap());
        let here = Key::of(&spec(512), &ours, &qemu, Accelerator::Tcg).unwrap();
        assert_eq!(key(&boot_id()).unwrap(), here);
    }

    #[test]
    fn only_sixteen_digits_are_a_key() {
        for bad in ["", "0123456789abcde", "0123456789abcdef0", "0123456789ABCDEF", "../../../../etc/x"] {
            assert!(bad.parse::<Key>().is_err(), "{bad}");
        }
        assert_eq!("0123456789abcdef".parse::<Key>().unwrap().as_str(), "0123456789abcdef");
    }
}
