//! `meta.json`: whose VM a run directory holds, and the processes that belong to it. Always complete on
//! disk: written to a second file, synced, renamed.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::process::HostProcess;
use super::{Role, RunDirError, io_error};

const FILE: &str = "meta.json";
const VERSION: u32 = 1;

/// Whose VM it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub container_id: String,
    /// Its bundle directory.
    pub bundle: PathBuf,
}

/// Contents of `meta.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    version: u32,
    /// Host boot that the processes belong to.
    boot_id: String,
    /// Whose VM it is.
    pub owner: Owner,
    /// In the order in which they were started; the shim first.
    pub processes: Vec<HostProcess>,
}

impl Meta {
    pub(super) fn new(owner: Owner) -> Self {
        Self { version: VERSION, boot_id: boot_id(), owner, processes: vec![] }
    }

    /// The processes that still run.
    #[must_use]
    pub fn live_processes(&self) -> Vec<&HostProcess> {
        if self.boot_id != boot_id() {
            return vec![];
        }
        self.processes.iter().filter(|process| process.is_alive()).collect()
    }

    /// The shim's process ID, if it still runs.
    #[must_use]
    pub fn live_shim(&self) -> Option<u32> {
        self.live_processes().iter().find(|process| process.role == Role::Shim).map(|shim| shim.pid)
    }

    pub(super) fn read(dir: &Path) -> Result<Self, RunDirError> {
        let path = dir.join(FILE);
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        let meta: Self = serde_json::from_slice(&bytes)
            .map_err(|source| RunDirError::Meta { path: path.clone(), source })?;
        if meta.version != VERSION {
            let cause = format!("format version {} is not {VERSION}", meta.version);
            return Err(RunDirError::Meta { path, source: serde::de::Error::custom(cause) });
        }
        Ok(meta)
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), RunDirError> {
        let path = dir.join(FILE);
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|source| RunDirError::Meta { path: path.clone(), source })?;
        write_whole(&path, &bytes).map_err(io_error("write", &path))
    }
}

/// Replaces a file so that a reader sees the old or the new contents, whole, even after a crash.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Changes with each boot of the host; empty where the kernel does not tell.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> Meta {
        let owner = Owner { namespace: "n".into(), container_id: "c".into(), bundle: "/b".into() };
        Meta::new(owner)
    }

    #[test]
    fn the_file_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let mut meta = meta();
        meta.processes.push(HostProcess { role: Role::Fsd, pid: 7, start_time: 9 });
        meta.write(dir.path()).unwrap();
        assert_eq!(Meta::read(dir.path()).unwrap(), meta);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "temporary file left");
    }

    #[test]
    fn another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let meta = Meta { version: 2, ..meta() };
        meta.write(dir.path()).unwrap();
        assert!(matches!(Meta::read(dir.path()), Err(RunDirError::Meta { .. })));
    }

    #[test]
    fn processes_of_an_earlier_boot_are_dead() {
        let mut meta = meta();
        meta.processes.push(HostProcess::of_live(Role::Shim, std::process::id()).unwrap());
        assert_eq!(meta.live_shim(), Some(std::process::id()));
        meta.boot_id = "earlier".into();
        assert!(meta.live_processes().is_empty());
    }
}
