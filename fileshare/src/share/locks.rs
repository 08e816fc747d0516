//! Who uses which folder: a lock on each, which goes with its holder however that ends.
//!
//! ```text
//!   upper, work, a root that is changed   exclusive: one union or container
//!   lower layers, a root that is not      shared: any number, as long as nobody's changes land there
//!   volumes                               none: they are asked for anew at each look
//! ```
//!
//! Invariant: what a guest keeps in its caches without limit, nobody else changes.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::spec::{ShareSpec, Top, UsedBy};
use crate::folder;

/// A union that was unmounted a moment ago still writes its changes to disk.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);

/// The folders of a share, locked.
#[derive(Debug, Default)]
pub struct Locks(#[expect(dead_code, reason = "held for their locks")] Vec<File>);

/// A folder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else changes it, or relies on its not being changed; one of those who do, where the kernel tells.
    #[error("{} is in use by another union or container{}", .0.display(), by(*.1))]
    InUse(PathBuf, Option<u32>),
    /// It cannot be opened or locked.
    #[error("Cannot lock {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

impl Locks {
    /// Locks all folders of the share but those that the caller has `locked`. Blocks for a while where one is in use.
    ///
    /// # Errors
    /// The first folder that cannot be had; nothing is locked then.
    pub fn take(spec: &ShareSpec, locked: Option<&Path>) -> Result<Self, LockError> {
        Self::take_within(PATIENCE, spec, locked)
    }

    fn take_within(patience: Duration, spec: &ShareSpec, locked: Option<&Path>) -> Result<Self, LockError> {
        let until = Instant::now() + patience;
        let wanted = folders(spec).filter(|(path, _)| Some(*path) != locked);
        wanted.map(|(path, how)| lock(spec.used_by, path, how, until)).collect::<Result<_, _>>().map(Self)
    }
}

fn folders(spec: &ShareSpec) -> impl Iterator<Item = (&Path, FlockOperation)> {
    const ALONE: FlockOperation = FlockOperation::NonBlockingLockExclusive;
    const SHARED: FlockOperation = FlockOperation::NonBlockingLockShared;
    let top: Vec<(&Path, _)> = match &spec.top {
        Top::None => vec![],
        Top::Overlay { upper, work } => vec![(upper, ALONE), (work, ALONE)],
        Top::Folder { path, read_only: false } => vec![(path, ALONE)],
        Top::Folder { path, read_only: true } => vec![(path, SHARED)],
    };
    top.into_iter().chain(spec.lowers.iter().map(|path| (path.as_path(), SHARED)))
}

fn lock(by: UsedBy, path: &Path, how: FlockOperation, until: Instant) -> Result<File, LockError> {
    let failed = |error| LockError::Io(path.to_owned(), error);
    let folder = match by {
        UsedBy::Union => folder::open(path, OFlags::RDONLY).map(File::from),
        // As containerd names it.
        UsedBy::Container => File::open(path),
    };
    let folder = folder.map_err(failed)?;
    loop {
        match flock(&folder, how) {
            Ok(()) => return Ok(folder),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => sleep(POLL),
            Err(Errno::WOULDBLOCK) => return Err(LockError::InUse(path.to_owned(), holder(&folder))),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

fn by(process: Option<u32>) -> String {
    process.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

/// A process that has a lock on the folder.
fn holder(folder: &File) -> Option<u32> {
    let stat = folder.metadata().ok()?;
    let (major, minor) = (rustix::fs::major(stat.dev()), rustix::fs::minor(stat.dev()));
    let file = format!("{major:02x}:{minor:02x}:{}", stat.ino());
    fs::read_to_string("/proc/locks").ok()?.lines().find_map(|line| holder_in(line, &file))
}

/// `1: FLOCK  ADVISORY  WRITE 7 fe:00:9 0 EOF`; a second line for who waits has an arrow in it. Who is in another PID
/// namespace has no number here.
fn holder_in(line: &str, file: &str) -> Option<u32> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    match fields[..] {
        [_, "FLOCK", _, _, pid, of, ..] if of == file => pid.parse().ok().filter(|pid| *pid > 0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folders(tempfile::TempDir);

    impl Folders {
        fn new() -> Self {
            Self::within(tempfile::tempdir().unwrap())
        }

        fn within(dir: tempfile::TempDir) -> Self {
            let folders = Self(dir);
            for name in ["low", "up", "work", "up2", "work2"] {
                fs::create_dir(folders.at(name)).unwrap();
            }
            folders
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().canonicalize().unwrap().join(name)
        }

        fn overlay(&self, low: &str, up: &str, work: &str) -> ShareSpec {
            let top = Top::Overlay { upper: self.at(up), work: self.at(work) };
            ShareSpec { lowers: vec![self.at(low)], top, ..ShareSpec::new() }
        }

        fn root(&self, name: &str, read_only: bool) -> ShareSpec {
            ShareSpec { top: Top::Folder { path: self.at(name), read_only }, ..ShareSpec::new() }
        }

        fn lowers(&self, name: &str) -> ShareSpec {
            ShareSpec { lowers: vec![self.at(name)], ..ShareSpec::new() }
        }
    }

    fn refused(spec: &ShareSpec) -> PathBuf {
        match Locks::take_within(Duration::ZERO, spec, None) {
            Err(LockError::InUse(path, _)) => path,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_one_changes_nobody_else_uses() {
        let folders = Folders::new();
        let first = Locks::take(&folders.overlay("low", "up", "work"), None).unwrap();
        for spec in [
            folders.overlay("low", "up", "work2"),
            folders.overlay("up", "up2", "work2"),
            folders.lowers("up"),
            folders.root("up", true),
        ] {
            assert_eq!(refused(&spec), folders.at("up"));
        }
        assert_eq!(refused(&folders.overlay("low", "up2", "work")), folders.at("work"));
        assert_eq!(refused(&folders.root("low", false)), folders.at("low"));
        let second = Locks::take(&folders.overlay("low", "up2", "work2"), None).unwrap();
        drop((first, second));
        Locks::take(&folders.root("low", false), None).unwrap();
    }

    #[test]
    fn who_has_it_is_named() {
        // Some file systems have other numbers for programs than in the kernel's table.
        let folders = Folders::within(tempfile::tempdir_in("/dev/shm").unwrap());
        let _first = Locks::take(&folders.overlay("low", "up", "work"), None).unwrap();
        let error = Locks::take_within(Duration::ZERO, &folders.lowers("up"), None).unwrap_err().to_string();
        let words = format!("up is in use by another union or container (process {})", std::process::id());
        assert!(error.ends_with(&words), "{error}");
        for line in
            ["1: -> FLOCK  ADVISORY  WRITE 7 fe:00:9 0 EOF", "1: FLOCK  ADVISORY  WRITE 0 fe:00:9 0 EOF"]
        {
            assert_eq!(holder_in(line, "fe:00:9"), None);
        }
    }

    #[test]
    fn what_is_in_use_for_a_moment_is_waited_for() {
        let folders = Folders::new();
        let (spec, first) = (folders.lowers("up"), Locks::take(&folders.root("up", false), None).unwrap());
        std::thread::scope(|scope| {
            let second = scope.spawn(|| Locks::take(&spec, None));
            sleep(2 * POLL);
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn what_nobody_changes_many_use() {
        let folders = Folders::new();
        let specs = [folders.lowers("low"), folders.lowers("low"), folders.root("low", true)];
        let locks: Vec<_> = specs.iter().map(|spec| Locks::take(spec, None).unwrap()).collect();
        drop(locks);
    }

    #[test]
    fn what_the_caller_has_locked_is_not_in_its_own_way() {
        let folders = Folders::new();
        let work = File::open(folders.at("work")).unwrap();
        flock(&work, FlockOperation::NonBlockingLockExclusive).unwrap();
        let spec = folders.overlay("low", "up", "work");
        assert_eq!(refused(&spec), folders.at("work"));
        Locks::take(&spec, Some(&folders.at("work"))).unwrap();
    }

    #[test]
    fn the_folders_of_a_union_are_reached_without_links() {
        let folders = Folders::new();
        std::os::unix::fs::symlink("low", folders.at("link")).unwrap();
        let by_link = folders.lowers("link");
        Locks::take(&by_link, None).unwrap();
        let union = ShareSpec { used_by: UsedBy::Union, ..by_link };
        assert!(matches!(Locks::take(&union, None), Err(LockError::Io(..))));
    }
}
