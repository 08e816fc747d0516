//! Removes what a VM left: for the shim's `delete` after a SIGKILLed shim, and for the next start.

use std::path::Path;
use std::time::Duration;
use std::{fs, io, process};

use super::meta::Meta;
use super::{RunDirError, RunKey, io_error};

/// How long a killed process may take to exit. QEMU frees its guest's memory in that time.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// What [`cleanup`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleanup {
    /// There was a directory, which is gone now.
    pub removed: bool,
    /// Process IDs that were killed.
    pub killed: Vec<u32>,
}

/// Kills every recorded process of the VM that still runs, except the caller, and removes the directory.
/// Doing it twice does no harm.
///
/// # Errors
/// A process that does not die, or a file that cannot be removed.
pub fn cleanup(run_dir: &Path, key: &RunKey) -> Result<Cleanup, RunDirError> {
    let dir = run_dir.join(key.as_str());
    if !dir.exists() {
        return Ok(Cleanup::default());
    }
    // Without readable metadata nothing was recorded, so all children died with their parent.
    let killed = Meta::read(&dir).map_or(Ok(vec![]), |meta| kill_all(&dir, &meta))?;
    remove_tree(&dir)?;
    Ok(Cleanup { removed: true, killed })
}

/// As [`cleanup`], but refuses while another process's shim lives.
pub(super) fn remove_stale(run_dir: &Path, key: &RunKey) -> Result<(), RunDirError> {
    let dir = run_dir.join(key.as_str());
    if let Ok(meta) = Meta::read(&dir)
        && let Some(shim) = meta.live_shim()
        && shim != process::id()
    {
        return Err(RunDirError::InUse { dir, container_id: meta.owner.container_id, shim });
    }
    cleanup(run_dir, key).map(drop)
}

pub(super) fn remove_tree(dir: &Path) -> Result<(), RunDirError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", dir)(error)),
        _ => Ok(()),
    }
}

fn kill_all(dir: &Path, meta: &Meta) -> Result<Vec<u32>, RunDirError> {
    let mut killed = vec![];
    for process in meta.live_processes() {
        if process.pid == process::id() {
            continue;
        }
        if !process.kill(EXIT_LIMIT) {
            let (role, pid) = (process.role, process.pid);
            return Err(RunDirError::Unkillable { dir: dir.to_owned(), role, pid });
        }
        killed.push(process.pid);
    }
    Ok(killed)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::{Owner, Role, RunDir};
    use super::*;

    #[test]
    fn recorded_processes_and_files_go() {
        let root = tempfile::tempdir().unwrap();
        let owner = Owner { namespace: "n".into(), container_id: "c".into(), bundle: "/b".into() };
        let key = RunKey::of_bundle(&owner.bundle);
        let dir = RunDir::create(root.path(), owner).unwrap();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        dir.record(Role::Qemu, child.id()).unwrap();
        fs::write(dir.control_socket(), "").unwrap();

        let done = cleanup(root.path(), &key).unwrap();
        assert_eq!(done, Cleanup { removed: true, killed: vec![child.id()] });
        assert!(!dir.path().exists());
        assert!(!child.wait().unwrap().success());
        assert_eq!(cleanup(root.path(), &key).unwrap(), Cleanup::default());
    }

    #[test]
    fn a_directory_without_metadata_goes() {
        let root = tempfile::tempdir().unwrap();
        let key = RunKey::of_bundle(Path::new("/b"));
        fs::create_dir(root.path().join(key.as_str())).unwrap();
        assert!(cleanup(root.path(), &key).unwrap().removed);
    }
}
