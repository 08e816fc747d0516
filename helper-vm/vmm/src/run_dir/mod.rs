//! The run directory of one VM: everything that it leaves on the host's disk while it lives.
//!
//! ```text
//!   RUN_DIR/                    config `run_dir`, 0711
//!     accel.json, accel.lock    see `accel`
//!     keys.lock                 held while a KEY is claimed or removed
//!     KEY/                      0700; KEY = first 16 hex digits of sha256(bundle path)
//!       meta.json               whose VM this is and which processes belong to it
//!       control.sock            the shim's control service
//!       vsock.sock              `CONNECT port` socket to the guest
//! ```
//!
//! Invariant: a process of the VM is either recorded in `meta.json` or dies with its parent (PDEATHSIG), so
//! [`cleanup`] leaves nothing behind, whenever the shim was killed. A recorded process is named by process
//! ID, start time and host boot, so that a reused number is never killed. Directories come and go under one lock,
//! so that none is removed between its making and its first `meta.json`, or after another shim has claimed it.

mod cleanup;
mod lock;
mod meta;
mod process;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

pub use cleanup::{Cleanup, cleanup, clear_dead};
pub use lock::lock;
pub use meta::{Meta, Owner};
pub(crate) use meta::{boot_id, write_whole};
pub use process::{HostProcess, Role};

/// Name of a VM's run directory: 16 hex digits of its bundle path's digest, which keeps paths of sockets
/// below the kernel's limit of 108 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunKey(String);

impl RunKey {
    const DIGITS: usize = 16;

    /// The key of the VM whose container has this bundle directory.
    #[must_use]
    pub fn of_bundle(bundle: &Path) -> Self {
        let digest = Sha256::digest(bundle.as_os_str().as_bytes());
        Self(digest.iter().take(Self::DIGITS / 2).map(|byte| format!("{byte:02x}")).collect())
    }

    /// The 16 digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RunKey {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (name.len() == Self::DIGITS && name.bytes().all(hex)).then(|| Self(name.to_owned())).ok_or(())
    }
}

/// A run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The VM that owns the directory still runs.
    #[error("{} belongs to {container_id}, whose process {shim} still runs: delete or unmount that first", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// Its container or mountpoint.
        container_id: String,
        /// Its shim's process ID.
        shim: u32,
    },
    /// A file or directory cannot be made, read or removed.
    #[error("Cannot {action} {}", path.display())]
    Io {
        /// "create", "read", "write", "remove", "list" or "lock".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// `meta.json` is no metadata of this version.
    #[error("Cannot parse {}", path.display())]
    Meta {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// A process does not die.
    #[error("Process {pid} ({role}) of {} does not exit after SIGKILL", dir.display())]
    Unkillable {
        /// The directory.
        dir: PathBuf,
        /// What it is.
        role: Role,
        /// The process.
        pid: u32,
    },
}

pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::Io { action, path, source }
}

/// The run directory of a VM that this process owns. Clones name the same directory.
#[derive(Clone, Debug)]
pub struct RunDir {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    meta: Mutex<Meta>,
}

impl RunDir {
    /// Makes the directory and records the calling process as its shim. What a killed shim left under the
    /// same key is cleaned up first.
    ///
    /// # Errors
    /// [`RunDirError::InUse`] when the shim of that directory is alive and is not this process.
    pub fn create(run_dir: &Path, owner: Owner) -> Result<Self, RunDirError> {
        let path = run_dir.join(RunKey::of_bundle(&owner.bundle).as_str());
        make_dir(run_dir).map_err(io_error("create", run_dir))?;
        let _keys = cleanup::lock_keys(run_dir)?;
        cleanup::remove_stale(&path)?;
        DirBuilder::new().mode(0o700).create(&path).map_err(io_error("create", &path))?;
        let meta = Meta::new(owner);
        let this = Self { inner: Arc::new(Inner { path, meta: Mutex::new(meta) }) };
        this.record(Role::Shim, std::process::id())?;
        Ok(this)
    }

    /// Adds a live process of this VM to `meta.json`.
    ///
    /// # Errors
    /// The file cannot be written, or there is no such process.
    pub fn record(&self, role: Role, pid: u32) -> Result<(), RunDirError> {
        let process = HostProcess::of_live(role, pid)
            .map_err(io_error("read", Path::new(&format!("/proc/{pid}/stat"))))?;
        let mut meta = self.meta_mut();
        meta.processes.push(process);
        meta.write(&self.inner.path)
    }

    /// Forgets all processes: what is left in the directory belongs to none of them any more.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn disown(&self) -> Result<(), RunDirError> {
        let mut meta = self.meta_mut();
        meta.processes.clear();
        meta.write(&self.inner.path)
    }

    /// Removes the directory and all in it.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn remove(&self) -> Result<(), RunDirError> {
        cleanup::remove_whole(&self.inner.path)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Where the shim serves `control.proto`.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.inner.path)
    }

    /// Where the VM's vsock takes `CONNECT port`.
    #[must_use]
    pub fn vsock_socket(&self) -> PathBuf {
        vsock_socket(&self.inner.path)
    }

    /// What is recorded.
    #[must_use]
    pub fn meta(&self) -> Meta {
        self.meta_mut().clone()
    }

    /// A panic while the lock was held leaves at worst one process unrecorded, never a torn value.
    fn meta_mut(&self) -> MutexGuard<'_, Meta> {
        self.inner.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One VM's run directory as another process sees it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub key: RunKey,
    /// The directory.
    pub path: PathBuf,
    /// Its `meta.json`.
    pub meta: Meta,
}

impl Entry {
    /// The entry with this key; `None` when there is no such directory.
    ///
    /// # Errors
    /// `meta.json` is missing or cannot be read.
    pub fn open(run_dir: &Path, key: &RunKey) -> Result<Option<Self>, RunDirError> {
        let path = run_dir.join(key.as_str());
        if !path.exists() {
            return Ok(None);
        }
        let meta = Meta::read(&path)?;
        Ok(Some(Self { key: key.clone(), path, meta }))
    }

    /// Where its shim serves `control.proto`.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.path)
    }

    /// Where its vsock takes `CONNECT port`.
    #[must_use]
    pub fn vsock_socket(&self) -> PathBuf {
        vsock_socket(&self.path)
    }
}

/// All VMs that have a readable run directory, in order of their keys. One that goes away or has no
/// `meta.json` yet is left out.
///
/// # Errors
/// The run directory itself cannot be listed; an absent one lists as empty.
pub fn list(run_dir: &Path) -> Result<Vec<Entry>, RunDirError> {
    let names = match fs::read_dir(run_dir) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(io_error("list", run_dir)(error)),
    };
    let keys = names.flatten().filter_map(|name| name.file_name().to_str()?.parse::<RunKey>().ok());
    let mut entries: Vec<Entry> = keys.filter_map(|key| Entry::open(run_dir, &key).ok().flatten()).collect();
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(entries)
}

/// Makes the directory that holds all VMs' directories; one that is there stays as it is.
///
/// # Errors
/// It cannot be made.
pub fn make_dir(run_dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(run_dir)
}

fn control_socket(dir: &Path) -> PathBuf {
    dir.join("control.sock")
}

fn vsock_socket(dir: &Path) -> PathBuf {
    dir.join("vsock.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner { namespace: "default".into(), container_id: "web".into(), bundle: "/run/bundle/web".into() }
    }

    #[test]
    fn keys_are_sixteen_hex_digits() {
        let key = RunKey::of_bundle(Path::new("/run/bundle/web"));
        assert_eq!(key, key.as_str().parse().unwrap());
        assert_ne!(key, RunKey::of_bundle(Path::new("/run/bundle/db")));
        for bad in ["", "..", "0123456789abcde", "0123456789abcdeg", "0123456789ABCDEF", "accel.json"] {
            assert!(bad.parse::<RunKey>().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn a_created_directory_is_listed_until_removed() {
        let root = tempfile::tempdir().unwrap();
        assert!(list(&root.path().join("absent")).unwrap().is_empty());
        let dir = RunDir::create(root.path(), owner()).unwrap();
        fs::write(root.path().join("accel.json"), "{}").unwrap();
        let entries = list(root.path()).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].meta, dir.meta());
        assert_eq!(entries[0].meta.owner, owner());
        assert_eq!(entries[0].meta.processes[0].role, Role::Shim);
        dir.remove().unwrap();
        assert!(list(root.path()).unwrap().is_empty());
        assert!(Entry::open(root.path(), &RunKey::of_bundle(&owner().bundle)).unwrap().is_none());
    }

    /// Of several that one process owns, one may end badly and be cleared while the others go on.
    #[test]
    fn what_is_disowned_is_removed_without_killing_anybody() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::create(root.path(), owner()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        dir.record(Role::Qemu, child.id()).unwrap();
        dir.disown().unwrap();
        assert!(list(root.path()).unwrap()[0].meta.live_processes().is_empty());
        let done = cleanup(root.path(), &RunKey::of_bundle(&owner().bundle)).unwrap();
        assert_eq!(done, Cleanup { removed: true, killed: vec![] });
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_second_vm_for_a_live_container_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = RunDir::create(root.path(), owner()).unwrap();
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        dir.meta_mut().processes[0] = HostProcess::of_live(Role::Shim, other.id()).unwrap();
        dir.meta_mut().write(dir.path()).unwrap();
        let message = RunDir::create(root.path(), owner()).unwrap_err().to_string();
        assert!(message.contains("belongs to web"), "{message}");
        other.kill().unwrap();
        other.wait().unwrap();
        RunDir::create(root.path(), owner()).unwrap();
    }
}
