//! The template directory: finding, opening, listing, removing. See the module for its layout.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, MemfdFlags, flock, memfd_create};
use rustix::io::Errno;

use super::manifest::{Manifest, SIZE_LIMIT, sha256};
use super::ram::{self, CopyError};
use super::{Key, TemplateError};
use crate::config::Config;
use crate::run_dir::boot_id;

pub(super) const MANIFEST: &str = "manifest";
pub(super) const STATE: &str = "state";
pub(super) const RAM: &str = "ram";

/// More than any machine's state without its RAM.
const STATE_LIMIT: u64 = 64 << 20;

/// After a failure, for so long no further attempt is made in the background.
const RETRY: Duration = Duration::from_secs(600);

/// How often, and how far apart, a lock is tried that is taken.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// What this boot of the host cannot use may be another host's, which shares the folder; and a log tells why there
/// is no template. They go when nobody has touched them for so long.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// Templates that are kept: each is some 75 MiB, and hosts rarely run more shapes of VMs.
const KEPT: usize = 4;

/// The template directory.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// One template as `vmctr template ls` shows it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub key: Key,
    /// Bytes that it takes on disk.
    pub bytes: u64,
    /// When it was last made or used.
    pub used: SystemTime,
    /// When it was made.
    pub made: SystemTime,
    /// Whether this boot of the host can use it.
    pub current: bool,
    /// What it is; `None` when it cannot be read.
    pub shape: Option<Shape>,
}

/// What kind of VM a template is for.
#[derive(Clone, Debug)]
pub struct Shape {
    /// In MiB.
    pub memory_mib: u32,
    /// Number of CPUs.
    pub vcpus: u32,
    /// Machine type.
    pub machine: &'static str,
    /// "kvm" or "tcg".
    pub accelerator: &'static str,
    /// QEMU that made it.
    pub qemu_version: String,
}

/// A template whose files are open: removing it meanwhile changes nothing.
#[derive(Debug)]
pub struct Template {
    pub(super) path: PathBuf,
    manifest: Manifest,
    state: Vec<u8>,
    ram: File,
}

/// The right to make or remove one template; freed when dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Store {
    /// The store that the configuration names; it need not exist.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let dir = config.template_dir.clone().unwrap_or_else(|| config.run_dir.join("templates"));
        Self { dir }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The run directories of VMs that become templates.
    pub(super) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Opens a template and checks all but its memory; `None` when there is none.
    ///
    /// # Errors
    /// It is damaged or cannot be read.
    pub fn open(&self, key: &Key) -> Result<Option<Template>, TemplateError> {
        let path = self.path(key);
        match Template::open(&path, key) {
            Err(TemplateError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && !path.exists() =>
            {
                Ok(None)
            }
            opened => opened.map(Some),
        }
    }

    /// All templates, by key.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn list(&self) -> Result<Vec<Entry>, TemplateError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries.map_err(TemplateError::io("list", &self.dir))?,
        };
        let keys = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        // One that goes meanwhile is none.
        let mut found: Vec<_> = keys.filter_map(|key| self.entry(key)).collect();
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    /// Removes a template; `false` when there is none. VMs that are being restored from it go on.
    ///
    /// # Errors
    /// A file cannot be removed, or another process is making this very template.
    pub fn remove(&self, key: &Key) -> Result<bool, TemplateError> {
        let there = self.path(key).exists();
        if there {
            self.clear(key)?;
        }
        Ok(there)
    }

    /// Removes all that has this name.
    fn clear(&self, key: &Key) -> Result<(), TemplateError> {
        let _lock = self.lock(key)?;
        remove_tree(&self.path(key))?;
        remove_tree(&self.fresh_path(key))?;
        // While it is held, so that nobody waits for a file that is gone.
        for file in [self.log_path(key), self.lock_path(key)] {
            // Nothing but a name is left then.
            let _ = fs::remove_file(file);
        }
        Ok(())
    }

    /// Where a maker in the background writes what it has to say.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create_log(&self, key: &Key) -> Result<File, TemplateError> {
        let path = self.log_path(key);
        let made = self.create_dir().and_then(|()| File::create(&path));
        made.map_err(TemplateError::io("create", &path))
    }

    /// Removes the least used templates above the number that is kept, but never `keep`, and what has become
    /// stale: templates of other boots, and what killed makers left.
    pub(super) fn prune(&self, keep: &Key) -> Result<(), TemplateError> {
        let mut others = self.list()?;
        others.retain(|entry| entry.key != *keep);
        others.sort_by_key(|entry| std::cmp::Reverse(entry.used));
        let (ours, foreign): (Vec<_>, Vec<_>) = others.into_iter().partition(|entry| entry.current);
        let surplus = ours.into_iter().skip(KEPT - 1);
        let stale = foreign.into_iter().filter(|entry| is_stale(entry.used));
        for key in surplus.chain(stale).map(|entry| entry.key).chain(self.remains()?) {
            match self.clear(&key) {
                // Whoever makes it anew replaces it.
                Ok(()) | Err(TemplateError::Busy(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Keys of which there is no template, but for long what a maker needs that was killed or has failed.
    fn remains(&self) -> Result<BTreeSet<Key>, TemplateError> {
        let mut newest = BTreeMap::new();
        for entry in fs::read_dir(&self.dir).map_err(TemplateError::io("list", &self.dir))?.flatten() {
            let name = entry.file_name();
            let key = name.to_str().and_then(|name| name.split_once('.')?.0.parse::<Key>().ok());
            if let (Some(key), Ok(time)) = (key, entry.metadata().and_then(|entry| entry.modified())) {
                let newest = newest.entry(key).or_insert(time);
                *newest = time.max(*newest);
            }
        }
        newest.retain(|key, time| is_stale(*time) && !self.path(key).exists());
        Ok(newest.into_keys().collect())
    }

    /// Whether some process is making this template.
    #[must_use]
    pub fn is_being_made(&self, key: &Key) -> bool {
        let Ok(file) = File::open(self.lock_path(key)) else { return false };
        flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    }

    /// Whether a maker in the background said why it failed not long ago: the next one would say the same.
    #[must_use]
    pub fn failed_lately(&self, key: &Key) -> bool {
        let Ok(log) = fs::metadata(self.log_path(key)) else { return false };
        let age = log.modified().ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
        log.len() > 0 && age < RETRY && !self.path(key).exists()
    }

    /// Takes the lock, or says that it is taken. A file that a killed holder left is no lock. Whoever only looks
    /// whether it is taken holds it for a moment, which is waited for.
    pub(super) fn lock(&self, key: &Key) -> Result<Lock, TemplateError> {
        let path = self.lock_path(key);
        let locked = self.create_dir().and_then(|()| {
            for _ in 0..LOCK_ATTEMPTS {
                if let Some(lock) = try_lock(&path)? {
                    return Ok(Some(lock));
                }
                sleep(LOCK_PAUSE);
            }
            try_lock(&path)
        });
        locked.map_err(TemplateError::io("lock", &path))?.ok_or_else(|| TemplateError::Busy(key.clone()))
    }

    /// Directory of one template, which need not exist.
    #[must_use]
    pub fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(key.as_str())
    }

    /// An empty directory for the holder of the lock to fill.
    pub(super) fn fresh(&self, key: &Key, _lock: &Lock) -> Result<PathBuf, TemplateError> {
        let path = self.fresh_path(key);
        remove_tree(&path)?;
        DirBuilder::new().mode(0o700).create(&path).map_err(TemplateError::io("create", &path))?;
        Ok(path)
    }

    /// Gives what was filled its name, in the place of what had it before.
    pub(super) fn publish(&self, key: &Key, fresh: &Path, _lock: &Lock) -> Result<(), TemplateError> {
        let path = self.path(key);
        remove_tree(&path)?;
        fs::rename(fresh, &path).map_err(TemplateError::io("rename", fresh))?;
        sync_dir(&self.dir)
    }

    fn create_dir(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)
    }

    fn fresh_path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{key}.new"))
    }

    fn log_path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{key}.log"))
    }

    fn lock_path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{key}.lock"))
    }

    fn entry(&self, key: Key) -> Option<Entry> {
        let path = self.path(&key);
        let bytes = [MANIFEST, STATE, RAM].iter().filter_map(|name| fs::metadata(path.join(name)).ok());
        let bytes = bytes.map(|metadata| metadata.blocks() * 512).sum();
        let metadata = fs::metadata(&path).ok()?;
        let made = fs::metadata(path.join(MANIFEST))
            .and_then(|file| file.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let manifest = read_manifest(&path, &key).ok();
        let current = manifest.as_ref().is_some_and(|manifest| manifest.host_boot == boot_id());
        let shape = manifest.map(|manifest| Shape {
            memory_mib: manifest.memory.mib(),
            vcpus: manifest.vcpus.get(),
            machine: manifest.machine.as_str(),
            accelerator: manifest.accelerator.as_str(),
            qemu_version: manifest.qemu_version,
        });
        Some(Entry { key, bytes, used: metadata.modified().unwrap_or(made).max(made), made, current, shape })
    }
}

impl Template {
    pub(super) fn open(path: &Path, key: &Key) -> Result<Self, TemplateError> {
        let manifest = read_manifest(path, key)?;
        let state = read_file(&path.join(STATE), STATE_LIMIT)?;
        if state.len() as u64 != manifest.state.size || sha256(&state) != manifest.state.sha256 {
            return Err(TemplateError::damaged(path, "the machine's state has another size or digest"));
        }
        let ram_path = path.join(RAM);
        let ram = File::open(&ram_path).map_err(TemplateError::io("read", &ram_path))?;
        let size = ram.metadata().map_err(TemplateError::io("read", &ram_path))?.len();
        if size != manifest.ram.size {
            let what = format!("its memory has {size} bytes instead of {}", manifest.ram.size);
            return Err(TemplateError::damaged(path, what));
        }
        Ok(Self { path: path.to_owned(), manifest, state, ram })
    }

    /// Its name.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.manifest.key
    }

    /// The machine's state, as it was checked, for one QEMU: in a file of its own, open for reading. QEMU never has
    /// a descriptor of the template's files.
    pub(crate) fn open_state(&self) -> io::Result<File> {
        let copy = File::from(memfd_create("template-state", MemfdFlags::CLOEXEC)?);
        (&copy).write_all(&self.state)?;
        // QEMU takes a descriptor for reading only as just that.
        File::open(format!("/proc/self/fd/{}", copy.as_raw_fd()))
    }

    /// Copies the memory into `ram`, which holds zeros, and checks it.
    pub(crate) fn copy_ram(&self, ram: &File) -> Result<(), TemplateError> {
        ram::unpack(&self.ram, &self.manifest.ram, ram).map_err(|error| match error {
            CopyError::Io(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                TemplateError::io("copy", self.path.join(RAM))(error)
            }
            error => TemplateError::damaged(&self.path, error.to_string()),
        })
    }

    /// Notes the use, so that the least used templates go first.
    pub(crate) fn touch(&self) {
        // Only the order of removal is lost.
        let _ = File::open(&self.path).and_then(|dir| dir.set_modified(SystemTime::now()));
    }
}

fn is_stale(time: SystemTime) -> bool {
    time.elapsed().is_ok_and(|age| age > STALE)
}

fn read_manifest(path: &Path, key: &Key) -> Result<Manifest, TemplateError> {
    let bytes = read_file(&path.join(MANIFEST), SIZE_LIMIT)?;
    let manifest = Manifest::decode(&bytes).map_err(|what| TemplateError::damaged(path, what))?;
    if manifest.key != *key {
        return Err(TemplateError::damaged(path, format!("it is the template {}", manifest.key)));
    }
    Ok(manifest)
}

fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, TemplateError> {
    let mut bytes = vec![];
    let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    read.map(|_| bytes).map_err(TemplateError::io("read", path))
}

fn try_lock(path: &Path) -> io::Result<Option<Lock>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        // A lock on a file that has been removed meanwhile excludes nobody.
        Ok(()) => Ok(is_at(&file, path).then_some(Lock { _file: file })),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(ours), Ok(there)) if same(&ours, &there))
}

pub(super) fn remove_tree(path: &Path) -> Result<(), TemplateError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(TemplateError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

pub(super) fn sync_dir(path: &Path) -> Result<(), TemplateError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(TemplateError::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef";

    fn store(dir: &Path) -> Store {
        Store { dir: dir.to_owned() }
    }

    #[test]
    fn one_who_only_looks_keeps_no_maker_away() {
        let dir = tempfile::tempdir().unwrap();
        let (store, key) = (store(dir.path()), KEY.parse().unwrap());
        drop(store.lock(&key).unwrap());
        let looks = File::open(store.lock_path(&key)).unwrap();
        flock(&looks, FlockOperation::NonBlockingLockShared).unwrap();
        let looker = std::thread::spawn(move || {
            sleep(LOCK_PAUSE * 3);
            drop(looks);
        });
        let lock = store.lock(&key).unwrap();
        assert!(store.is_being_made(&key));
        assert!(matches!(store.lock(&key), Err(TemplateError::Busy(_))));
        drop(lock);
        assert!(!store.is_being_made(&key));
        looker.join().unwrap();
    }
    /// What other hosts use stays; what nobody uses goes, whoever left it.
    #[test]
    fn only_what_nobody_has_touched_for_long_is_swept_away() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (SystemTime::now() - STALE * 2, SystemTime::now());
        for (name, time) in [
            ("0000000000000001", old),
            ("0000000000000001.lock", new),
            ("0000000000000002", new),
            ("0000000000000003.new", old),
            ("0000000000000003.lock", old),
            ("0000000000000003.log", old),
            ("0000000000000004.new", old),
            ("0000000000000004.lock", new),
            ("0000000000000005.new", old),
            ("0000000000000005.lock", old),
            ("notes.txt", old),
        ] {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            if name.ends_with("lock") || name.ends_with("log") || name.ends_with("txt") {
                fs::remove_dir(&path).unwrap();
                fs::write(&path, "").unwrap();
            }
            File::open(&path).unwrap().set_modified(time).unwrap();
        }
        let store = store(dir.path());
        let being_made = store.lock(&"0000000000000005".parse().unwrap()).unwrap();
        store.prune(&KEY.parse().unwrap()).unwrap();
        drop(being_made);
        let entries = fs::read_dir(dir.path()).unwrap();
        let mut left: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        let two = ["0000000000000002", "0000000000000004.lock", "0000000000000004.new"];
        let rest = ["0000000000000005.lock", "0000000000000005.new", "notes.txt"];
        assert_eq!(left, [two, rest].concat());
    }
}
