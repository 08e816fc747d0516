//! Removes what a VM left: for the shim's `delete` after a SIGKILLed shim, and for the next start.
//!
//! Invariant: who is killed and what is removed is decided by one reading of `meta.json`, under the lock under which
//! directories are claimed.

use std::fs::File;
use std::path::Path;
use std::time::Duration;
use std::{fs, io, process};

use super::lock::lock;
use super::meta::Meta;
use super::{RunDirError, RunKey, io_error};

/// How long a killed process may take to exit. QEMU frees its guest's memory in that time.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// Whoever holds the lock may have some processes to wait for.
const LOCK_LIMIT: Duration = Duration::from_secs(30);

/// What [`cleanup`] found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleanup {
    /// There was a directory, which is gone now.
    pub removed: bool,
    /// Process IDs that were killed.
    pub killed: Vec<u32>,
}

/// Kills every recorded process of the VM that still runs, its shim too, except the caller, and removes the directory.
/// Doing it twice does no harm.
///
/// # Errors
/// A process that does not die, or a file that cannot be removed.
pub fn cleanup(run_dir: &Path, key: &RunKey) -> Result<Cleanup, RunDirError> {
    let dir = run_dir.join(key.as_str());
    if !dir.exists() {
        return Ok(Cleanup::default());
    }
    let _keys = lock_keys(run_dir)?;
    let killed = kill_all(&dir, Meta::read(&dir).ok().as_ref())?;
    remove_tree(&dir)?;
    Ok(Cleanup { removed: true, killed })
}

/// What a shim has left that is dead: killed and removed as by [`cleanup`]. Whether it is dead is decided by what is
/// recorded now, whatever the caller has seen before.
///
/// # Errors
/// [`RunDirError::InUse`], and nothing is touched, when another process's shim lives; as `cleanup` otherwise.
pub fn clear_dead(run_dir: &Path, key: &RunKey) -> Result<(), RunDirError> {
    let dir = run_dir.join(key.as_str());
    if !dir.exists() {
        return Ok(());
    }
    let _keys = lock_keys(run_dir)?;
    remove_stale(&dir)
}

/// The right to make and remove directories of VMs.
pub(super) fn lock_keys(run_dir: &Path) -> Result<File, RunDirError> {
    let path = run_dir.join("keys.lock");
    lock(&path, LOCK_LIMIT).map_err(io_error("lock", &path))
}

/// As [`clear_dead`], by who holds the lock.
pub(super) fn remove_stale(dir: &Path) -> Result<(), RunDirError> {
    let meta = Meta::read(dir).ok();
    if let Some(meta) = &meta
        && let Some(shim) = meta.live_shim()
        && shim != process::id()
    {
        let container_id = meta.owner.container_id.clone();
        return Err(RunDirError::InUse { dir: dir.to_owned(), container_id, shim });
    }
    kill_all(dir, meta.as_ref())?;
    remove_tree(dir)
}

/// Removes a directory of the caller's own, so that nobody sees half of it.
pub(super) fn remove_whole(dir: &Path) -> Result<(), RunDirError> {
    match dir.parent() {
        Some(run_dir) if dir.exists() => {
            let _keys = lock_keys(run_dir)?;
            remove_tree(dir)
        }
        _ => Ok(()),
    }
}

fn remove_tree(dir: &Path) -> Result<(), RunDirError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// Without readable metadata nothing was recorded, so all children died with their parent.
fn kill_all(dir: &Path, meta: Option<&Meta>) -> Result<Vec<u32>, RunDirError> {
    let mut killed = vec![];
    for process in meta.map(Meta::live_processes).unwrap_or_default() {
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

    /// Whoever saw it dead before has no say: another shim may have claimed it since.
    #[test]
    fn what_a_live_shim_holds_is_not_cleared() {
        let root = tempfile::tempdir().unwrap();
        let owner = Owner { namespace: "n".into(), container_id: "c".into(), bundle: "/b".into() };
        let key = RunKey::of_bundle(&owner.bundle);
        let dir = RunDir::create(root.path(), owner).unwrap();
        let mut shim = Command::new("sleep").arg("60").spawn().unwrap();
        dir.disown().unwrap();
        dir.record(Role::Shim, shim.id()).unwrap();
        let refused = clear_dead(root.path(), &key).unwrap_err();
        assert!(matches!(&refused, RunDirError::InUse { .. }), "{refused}");
        assert!(dir.path().exists() && shim.try_wait().unwrap().is_none());
        shim.kill().unwrap();
        shim.wait().unwrap();
        clear_dead(root.path(), &key).unwrap();
        assert!(!dir.path().exists());
    }

    #[test]
    fn nothing_is_claimed_or_removed_while_another_does_so() {
        let root = tempfile::tempdir().unwrap();
        let owner = Owner { namespace: "n".into(), container_id: "c".into(), bundle: "/b".into() };
        let dir = RunDir::create(root.path(), owner.clone()).unwrap();
        let steps: [fn(&Path, Owner, &RunDir); 3] = [
            |root, owner, _| clear_dead(root, &RunKey::of_bundle(&owner.bundle)).unwrap(),
            |root, owner, _| drop(RunDir::create(root, owner).unwrap()),
            |_, _, dir| dir.remove().unwrap(),
        ];
        for step in steps {
            let held = lock_keys(root.path()).unwrap();
            let (place, owner, own) = (root.path().to_owned(), owner.clone(), dir.clone());
            fs::create_dir_all(dir.path()).unwrap();
            let mark = dir.path().join("mark");
            fs::write(&mark, "").unwrap();
            let waits = std::thread::spawn(move || step(&place, owner, &own));
            std::thread::sleep(Duration::from_millis(50));
            assert!(mark.exists());
            drop(held);
            waits.join().unwrap();
            assert!(!mark.exists());
        }
    }

    #[test]
    fn a_directory_without_metadata_goes() {
        let root = tempfile::tempdir().unwrap();
        let key = RunKey::of_bundle(Path::new("/b"));
        fs::create_dir(root.path().join(key.as_str())).unwrap();
        assert!(cleanup(root.path(), &key).unwrap().removed);
    }
}
