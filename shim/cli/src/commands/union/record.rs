//! What is known of the mounts of this host: their run directories, and the kernel's mount table.
//!
//! ```text
//!   RUN_DIR/KEY/       KEY from the mountpoint
//!     meta.json        the background process; a union's VM and share daemon
//!     mount.json       what is mounted
//!     relay.json       what its relay has done so far
//!     device           of its file system, as the kernel's table has it; not there before it is mounted, and `gone`
//!                      when nobody uses it any more: then the kernel gives the number to another file system
//!     log              what the background process has to say
//!     lost             why the mount fails, or what was lost with it; stays when that is to be known
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmctr_fileshare::export::host::Figures;
use vmctr_vmm::run_dir::{self, Entry, Owner, Role, RunDir, RunDirError, RunKey};

use super::order::Order;
use super::table::{self, Line};
use crate::output::shell_word;

/// Stands where containers have containerd's namespace.
const NAMESPACE: &str = "vmctr-union";

const FILE: &str = "mount.json";
const LOG: &str = "log";
const LOST: &str = "lost";
const RELAY: &str = "relay.json";
const DEVICE: &str = "device";
const GONE: &str = "gone";

/// Of what the background process notes.
const MAX_NOTE: usize = 4096;

/// How long a mount that was taken away a moment ago may keep its place.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);

/// A mountpoint cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Its run directory cannot be had.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// What could not be written to disk is to be known before it is forgotten.
    #[error("What is left of a mount is on {}: {why}: `vmctr umount {}` clears it", .mountpoint.display(), shell_word(.mountpoint))]
    Noted {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// What was noted.
        why: String,
    },
    /// Another mount has the place, or keeps it for a moment yet.
    #[error("{0}")]
    Taken(String),
}

/// A mount that has a run directory.
#[derive(Debug)]
pub struct Mount {
    /// Its run directory.
    pub entry: Entry,
    /// Where it is, or was, mounted.
    pub mountpoint: PathBuf,
    /// What it is; none while it is being made, or if the file is damaged.
    pub order: Option<Order>,
    /// What went wrong.
    pub lost: Option<String>,
    /// Its file system's.
    pub device: Option<String>,
}

/// What a union's relay has done so far: requests that somebody waited for the VM to answer, and what was read
/// and written on the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Relay {
    /// Requests that the VM was asked, in all.
    pub turns: u64,
    /// The same by their names.
    pub requests: BTreeMap<String, u64>,
    /// Reads that it was not asked.
    pub host_reads: u64,
    /// Writes that it was not asked.
    #[serde(default)]
    pub host_writes: u64,
    /// Files and folders that the host's kernel knows of it.
    #[serde(default)]
    pub nodes: u64,
}

impl From<Figures> for Relay {
    fn from(Figures { requests, host_reads, host_writes, nodes }: Figures) -> Self {
        let turns = requests.values().sum();
        let requests = requests.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        Self { turns, requests, host_reads, host_writes, nodes }
    }
}

/// How it is with a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It works.
    Mounted,
    /// It is being mounted, or its changes are being written to disk.
    Changing,
    /// Its VM or container has ended: all that is asked of it fails.
    Lost,
    /// Its process has ended: only leftovers are there.
    Dead,
}

impl State {
    /// As it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mounted => "mounted",
            Self::Changing => "changing",
            Self::Lost => "lost",
            Self::Dead => "dead",
        }
    }
}

/// Who owns a mount's run directory.
pub fn owner(mountpoint: &Path) -> Owner {
    Owner {
        namespace: NAMESPACE.to_owned(),
        container_id: mountpoint.display().to_string(),
        bundle: mountpoint.to_owned(),
    }
}

/// Makes the run directory of what is to be mounted there, unless what happened to the mount before is to be known.
/// Blocks for a while where another process still writes to disk what was changed in that.
pub fn claim(run_dir: &Path, mountpoint: &Path) -> Result<RunDir, ClaimError> {
    let until = Instant::now() + PATIENCE;
    loop {
        check_seen(run_dir, mountpoint)?;
        match RunDir::create(run_dir, owner(mountpoint)) {
            Err(RunDirError::InUse { .. }) if Instant::now() < until => sleep(POLL),
            Err(RunDirError::InUse { .. }) => return Err(ClaimError::Taken(why_taken(run_dir, mountpoint))),
            outcome => return Ok(outcome?),
        }
    }
}

/// Why there is no place for another mount.
pub fn why_taken(run_dir: &Path, mountpoint: &Path) -> String {
    let place = mountpoint.display();
    let other = find(run_dir, mountpoint).ok().flatten();
    let kind = other.as_ref().map_or("union", Mount::kind);
    if is_mounted(mountpoint) {
        return format!("A {kind} is mounted on {place} already");
    }
    if other.is_none_or(|other| other.device.is_none()) {
        return format!("A {kind} is just being mounted on {place}");
    }
    format!(
        "What was mounted on {place} is unmounted, but still used, or its changes are being written to disk: \
         `vmctr umount {}` waits for that, and says who uses it",
        shell_word(mountpoint)
    )
}

/// Whoever had the directory before notes what was lost before it lets the directory go: so that is looked at first.
fn check_seen(run_dir: &Path, mountpoint: &Path) -> Result<(), ClaimError> {
    let Ok(Some(before)) = find(run_dir, mountpoint) else { return Ok(()) };
    if before.process(Role::Shim).is_some() {
        return Ok(());
    }
    match fs::read_to_string(before.entry.path.join(LOST)) {
        Ok(why) => Err(ClaimError::Noted { mountpoint: mountpoint.to_owned(), why }),
        Err(_) => Ok(()),
    }
}

/// Writes down what is mounted.
pub fn write(dir: &Path, order: &Order) -> io::Result<()> {
    write_whole(&dir.join(FILE), &serde_json::to_vec_pretty(order)?)
}

/// Writes down which file system it is, now that it is mounted.
pub fn write_device(dir: &Path, mountpoint: &Path) -> io::Result<()> {
    match table::topmost(mountpoint).filter(Line::is_ours) {
        Some(line) => write_whole(&dir.join(DEVICE), line.device.as_bytes()),
        None => Ok(()),
    }
}

/// Writes down that its file system is gone.
pub fn write_gone(dir: &Path) -> io::Result<()> {
    write_whole(&dir.join(DEVICE), GONE.as_bytes())
}

/// Writes down what went wrong.
pub fn note_lost(dir: &Path, why: &str) -> io::Result<()> {
    let end = why.floor_char_boundary(MAX_NOTE);
    write_whole(&dir.join(LOST), &why.as_bytes()[..end])
}

/// Writes down what its relay has done.
pub fn write_relay(dir: &Path, relay: &Relay) -> io::Result<()> {
    write_whole(&dir.join(RELAY), &serde_json::to_vec(relay)?)
}

fn write_whole(whole: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = whole.with_extension("tmp");
    fs::write(&part, bytes)?;
    fs::rename(part, whole)
}

/// Where the background process writes what it has to say.
pub fn log(dir: &Path) -> PathBuf {
    dir.join(LOG)
}

/// All mounts, in the order of their mountpoints.
pub fn list(run_dir: &Path) -> Result<Vec<Mount>, RunDirError> {
    let mut mounts: Vec<_> = run_dir::list(run_dir)?.into_iter().filter_map(Mount::of).collect();
    mounts.sort_by(|a, b| a.mountpoint.cmp(&b.mountpoint));
    Ok(mounts)
}

/// The mount at a mountpoint. One whose directory is just being filled or removed is none.
pub fn find(run_dir: &Path, mountpoint: &Path) -> Result<Option<Mount>, RunDirError> {
    match Entry::open(run_dir, &RunKey::of_bundle(mountpoint)) {
        Err(RunDirError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        entry => Ok(entry?.and_then(Mount::of)),
    }
}

/// Whether there are files of a mount at this mountpoint.
pub fn has_files(run_dir: &Path, mountpoint: &Path) -> bool {
    run_dir.join(RunKey::of_bundle(mountpoint).as_str()).exists()
}

impl Mount {
    fn of(entry: Entry) -> Option<Self> {
        if entry.meta.owner.namespace != NAMESPACE {
            return None;
        }
        let mountpoint = entry.meta.owner.bundle.clone();
        let order = fs::read(entry.path.join(FILE)).ok();
        let order = order.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let lost = fs::read_to_string(entry.path.join(LOST)).ok();
        let device = fs::read_to_string(entry.path.join(DEVICE)).ok();
        Some(Self { entry, mountpoint, order, lost, device })
    }

    /// What it is of.
    pub fn kind(&self) -> &'static str {
        match self.order {
            Some(Order::Container(_)) => "container",
            Some(Order::Union(_)) | None => "union",
        }
    }

    /// What its relay had done a moment ago.
    pub fn relay(&self) -> Relay {
        let bytes = fs::read(self.entry.path.join(RELAY)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// How it is with it now.
    pub fn state(&self) -> State {
        let live = |role| self.process(role).is_some();
        match (live(Role::Shim), self.is_mounted()) {
            (false, _) => State::Dead,
            (true, false) => State::Changing,
            // Its process notes at once when its VM ends; whoever unmounts it after that knows of the loss.
            (true, true) if self.lost.is_none() => State::Mounted,
            (true, true) => State::Lost,
        }
    }

    /// Whether it has not been in its place yet.
    pub fn is_coming(&self) -> bool {
        self.device.is_none() && self.state() == State::Changing
    }

    /// Whether it is in its place, seen or covered by something else.
    pub fn is_mounted(&self) -> bool {
        let is_it = |line: &Line| self.device.as_ref().is_none_or(|device| *device == line.device);
        table::own().iter().any(|line| line.is_ours() && line.point == self.mountpoint && is_it(line))
    }

    /// The live process with this role.
    pub fn process(&self, role: Role) -> Option<u32> {
        self.entry.meta.live_processes().into_iter().find(|process| process.role == role).map(|live| live.pid)
    }
}

/// Whether something of ours is mounted there.
pub fn is_mounted(mountpoint: &Path) -> bool {
    table::own().iter().any(|line| line.is_ours() && line.point == mountpoint)
}

/// A mountpoint as it was recorded: absolute, without symbolic links. The mount itself is not asked, which may not
/// answer any more.
pub fn resolve(mountpoint: &Path) -> io::Result<PathBuf> {
    let full = std::path::absolute(mountpoint)?;
    let (Some(parent), Some(name)) = (full.parent(), full.file_name()) else { return fs::canonicalize(full) };
    let place = fs::canonicalize(parent)?.join(name);
    match fs::read_link(&place) {
        Ok(_) => fs::canonicalize(&place),
        Err(_) => Ok(place),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_is_not_forgotten_unseen() {
        let root = tempfile::tempdir().unwrap();
        let place = Path::new("/mnt/x");
        let dir = claim(root.path(), place).unwrap();
        note_lost(dir.path(), "Changes may be lost").unwrap();
        dir.disown().unwrap();
        let refused = claim(root.path(), place).unwrap_err().to_string();
        assert!(refused.contains("Changes may be lost: `vmctr umount /mnt/x`"), "{refused}");
        run_dir::clear_dead(root.path(), &RunKey::of_bundle(place)).unwrap();
        claim(root.path(), place).unwrap();
    }

    #[test]
    fn what_comes_and_what_goes_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let place = Path::new("/mnt/x");
        let dir = claim(root.path(), place).unwrap();
        let found = || find(root.path(), place).unwrap().unwrap();
        assert!(found().is_coming());
        assert_eq!(why_taken(root.path(), place), "A union is just being mounted on /mnt/x");
        fs::write(dir.path().join(DEVICE), "0:9999").unwrap();
        assert!(!found().is_coming());
        assert!(why_taken(root.path(), place).contains("is unmounted, but still used"));
    }

    #[test]
    fn a_mountpoint_is_resolved_by_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        fs::create_dir_all(real.join("mnt")).unwrap();
        std::os::unix::fs::symlink(&real, dir.path().join("link")).unwrap();
        assert_eq!(resolve(&dir.path().join("link/mnt")).unwrap(), real.join("mnt"));
        assert_eq!(resolve(&dir.path().join("link")).unwrap(), real);
        assert_eq!(resolve(&dir.path().join("link/mnt/..")).unwrap(), real);
    }
}
