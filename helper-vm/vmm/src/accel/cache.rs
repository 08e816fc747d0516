//! `accel.json`: the probe's answer, valid for one kernel, one QEMU and one boot of the host.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{AccelError, PROBE_LIMIT, Resolution};
use crate::assets::GuestAssets;
use crate::config::Config;
use crate::qemu::{Qemu, QemuVersion};
use crate::run_dir::{boot_id, lock, make_dir, write_whole};
use crate::spec::Machine;

/// For some probes that fail, one after the other.
const LOCK_LIMIT: Duration = PROBE_LIMIT.saturating_mul(6);

/// What the answer depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    kernel_sha256: String,
    qemu: PathBuf,
    qemu_version: QemuVersion,
    machine: Machine,
    boot_id: String,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    key: Key,
    answer: Resolution,
}

/// The cache file for one key. A file that cannot be read or parsed holds no answer.
pub(super) struct Cache {
    file: PathBuf,
    lock: PathBuf,
    key: Key,
}

impl Key {
    pub(super) fn new(config: &Config, assets: &GuestAssets, qemu: &Qemu) -> Self {
        Self {
            kernel_sha256: assets.manifest().kernel.sha256.clone(),
            qemu: qemu.path().to_owned(),
            qemu_version: qemu.version(),
            machine: config.vm.machine,
            boot_id: boot_id(),
        }
    }
}

impl Cache {
    pub(super) fn new(run_dir: &Path, key: Key) -> Result<Self, AccelError> {
        let io = |source| AccelError::Io { path: run_dir.to_owned(), source };
        make_dir(run_dir).map_err(io)?;
        Ok(Self { file: run_dir.join("accel.json"), lock: run_dir.join("accel.lock"), key })
    }

    pub(super) fn read(&self) -> Option<Resolution> {
        let stored: Stored = serde_json::from_slice(&fs::read(&self.file).ok()?).ok()?;
        (stored.key == self.key).then_some(stored.answer)
    }

    pub(super) fn write(&self, answer: &Resolution) -> Result<(), AccelError> {
        let stored = Stored { key: self.key.clone(), answer: answer.clone() };
        serde_json::to_vec_pretty(&stored)
            .map_err(io::Error::from)
            .and_then(|bytes| write_whole(&self.file, &bytes))
            .map_err(|source| AccelError::Io { path: self.file.clone(), source })
    }

    /// Waits for the lock; it is free again when the returned file is closed, however the holder ends.
    pub(super) async fn lock(&self) -> Result<File, AccelError> {
        let path = self.lock.clone();
        let locked = tokio::task::spawn_blocking(move || lock(&path, LOCK_LIMIT));
        locked
            .await
            .map_err(AccelError::Wait)?
            .map_err(|source| AccelError::Io { path: self.lock.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{FlockOperation, flock};

    use super::super::Accelerator;
    use super::*;

    fn key(kernel: &str) -> Key {
        Key {
            kernel_sha256: kernel.into(),
            qemu: "/usr/bin/qemu".into(),
            qemu_version: QemuVersion { major: 10, minor: 0, micro: 2 },
            machine: Machine::Q35,
            boot_id: "boot".into(),
        }
    }

    fn answer() -> Resolution {
        Resolution { accelerator: Accelerator::Tcg, reason: "no KVM".into() }
    }

    #[test]
    fn an_answer_holds_for_its_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let cache = Cache::new(&run_dir, key("a")).unwrap();
        assert_eq!(cache.read(), None);
        cache.write(&answer()).unwrap();
        assert_eq!(cache.read(), Some(answer()));
        assert_eq!(Cache::new(&run_dir, key("b")).unwrap().read(), None);
        fs::write(run_dir.join("accel.json"), "{").unwrap();
        assert_eq!(cache.read(), None);
    }

    #[tokio::test]
    async fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), key("a")).unwrap();
        let held = cache.lock().await.unwrap();
        let second = File::open(dir.path().join("accel.lock")).unwrap();
        assert!(flock(&second, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(held);
        flock(&second, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
