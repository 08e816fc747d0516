//! Reading lower files on the host, where their bytes are, instead of through the guest.
//!
//! ```text
//!   first read ──> guest: data, and a hint: layer, path, size, time
//!                    └─ looked for below the layer's folder, compared ──> host's file
//!   next reads ──> host's file, until somebody may have changed the union's ──> guest again
//!
//!   listing ─────> guest: entries, and hints: the folder's path, each file's layer ──> kept
//!   first read ──> host's file, found by what was kept: no turn at all
//! ```
//!
//! The kernel's cache stays the one place where all openers and mappings of the file meet, so a copy-up needs no
//! more than that reads go elsewhere from then on. (With the kernel's own FUSE passthrough an open file keeps its
//! lower file for good: readers would never see what is written after a copy-up.)
//!
//! Invariants:
//! 1. Only regular files beneath the layers' folders are opened, on their mounts, symbolic links never followed: a
//!    guest that lies gets one lower file for another.
//! 2. A file that was opened to write, truncated or copied to since the hint was asked for is not read here.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::OFlags;

use super::check::Folder;
use super::clock::Clock;
use super::device::Device;
use super::layers::Layers;
use super::pipe::{self, Pipe};
use super::question::{opens_to_write, u32_at, u64_at};
use super::regular::{Permit, Permits, Regular, another};
use super::served;
use super::shared::lock;
use crate::export::bytes::read_at;
use crate::export::wire::abi::{Attr, flag, op};
use crate::export::wire::codec::{Malformed, Take};

/// How many files' places are kept.
const MOST_PLACES: usize = 1 << 17;

/// The layers, and what was changed.
#[derive(Debug)]
pub(super) struct Shortcut {
    layers: Layers,
    /// Of what files hold.
    clock: Clock,
    places: Mutex<HashMap<u64, Place>>,
    permits: Permits,
    reads: AtomicU64,
}

/// Where a lower file is, and what it was like when the guest said so.
#[derive(Clone, Debug)]
struct Place {
    layer: usize,
    folder: Arc<[u8]>,
    /// Beneath that folder: of a file that was told of alone, the whole path.
    name: Box<[u8]>,
    facts: Facts,
    since: u64,
}

/// Size and time of change.
type Facts = (u64, u64, u32);

fn keep_one(places: &mut HashMap<u64, Place>, nodeid: u64, place: Place) {
    if places.len() >= MOST_PLACES {
        places.clear();
    }
    places.insert(nodeid, place);
}

impl HostFile {
    /// A descriptor of the same file.
    pub(super) fn try_clone(&self) -> io::Result<OwnedFd> {
        self.file.try_clone()
    }
}

/// A lower file, open on the host.
#[derive(Debug)]
pub(super) struct HostFile {
    file: OwnedFd,
    size: u64,
    nodeid: u64,
    since: u64,
    _permit: Permit,
}

impl Shortcut {
    pub(super) fn new(layers: Layers) -> Self {
        Self {
            layers,
            clock: Clock::default(),
            places: Mutex::default(),
            permits: Permits::default(),
            reads: AtomicU64::new(0),
        }
    }

    /// The time, from before the guest is asked for a hint.
    pub(super) fn now(&self) -> u64 {
        self.clock.now()
    }

    /// A request that may change a file's contents is about to be sent, or was just answered.
    pub(super) fn note(&self, opcode: u32, nodeid: u64, body: &[u8]) {
        let node = match opcode {
            op::OPEN if opens_to_write(u32_at(body, 0)) => nodeid,
            op::SETATTR if u32_at(body, 0) & flag::FATTR_SIZE != 0 => nodeid,
            op::WRITE | op::FALLOCATE => nodeid,
            op::COPY_FILE_RANGE => u64_at(body, 16),
            _ => return,
        };
        self.clock.note(node);
    }

    /// Keeps where a listing says that files are; `since` is from before it was asked for.
    pub(super) fn keep(&self, folder: &Folder<'_>, since: u64) {
        if self.layers.all().is_empty() {
            return;
        }
        let path: Arc<[u8]> = folder.path.into();
        let mut places = lock(&self.places);
        for (entry, layer) in folder.in_layers() {
            let attr = Attr::take(&mut Take::new(entry.attr)).unwrap_or_default();
            if attr.kind() != libc::S_IFREG {
                continue;
            }
            let (folder, name) = (Arc::clone(&path), entry.name.into());
            let facts = (attr.size, attr.mtime, attr.mtimensec);
            keep_one(&mut places, entry.nodeid, Place { layer, folder, name, facts, since });
        }
    }

    /// Opens the file that a node is, if the guest said where it is, and nothing has changed it since.
    pub(super) fn at_hand(&self, nodeid: u64) -> Option<HostFile> {
        let place = lock(&self.places).get(&nodeid).cloned()?;
        if self.clock.is_changed(nodeid, place.since) {
            lock(&self.places).remove(&nodeid);
            return None;
        }
        let path = match &*place.folder {
            [] => place.name.to_vec(),
            folder => [folder, b"/", &*place.name].concat(),
        };
        self.open_permitted(nodeid, place.since, || self.find(place.layer, place.facts, &path))
    }

    /// Opens the file of a node of ours; `since` is from before its place was asked for.
    pub(super) fn own(
        &self,
        nodeid: u64,
        (place, attr): &(served::Place, Attr),
        since: u64,
    ) -> Option<HostFile> {
        let facts = (attr.size, attr.mtime, attr.mtimensec);
        self.open_permitted(nodeid, since, || self.find(place.layer, facts, &place.path()))
    }

    /// Opens the file that a hint names, if there is one and it is what the hint says, and keeps where that is.
    pub(super) fn follow(&self, hint: &[u8], nodeid: u64, since: u64) -> Option<HostFile> {
        if hint.is_empty() || self.layers.all().is_empty() {
            return None;
        }
        self.open_permitted(nodeid, since, || {
            let (layer, facts, path) = parse(hint).map_err(io::Error::other)?;
            let found = self.find(layer, facts, path)?;
            let place = Place { layer, folder: Arc::default(), name: path.into(), facts, since };
            keep_one(&mut lock(&self.places), nodeid, place);
            Ok(found)
        })
    }

    fn open_permitted(
        &self,
        nodeid: u64,
        since: u64,
        open: impl FnOnce() -> io::Result<(OwnedFd, u64)>,
    ) -> Option<HostFile> {
        let permit = self.permits.take()?;
        match open() {
            Ok((file, size)) => Some(HostFile { file, size, nodeid, since, _permit: permit }),
            Err(error) => {
                tracing::debug!(%error, "a hint leads nowhere");
                None
            }
        }
    }

    fn find(&self, layer: usize, facts: Facts, path: &[u8]) -> io::Result<(OwnedFd, u64)> {
        let folder = self.layers.get(layer).ok_or_else(|| io::Error::other("no such layer"))?;
        let found = Regular::find(folder, path)?;
        let st = &found.stat;
        let seen = (st.st_size.cast_unsigned(), st.st_mtime.cast_unsigned(), st.st_mtime_nsec as u32);
        if seen != facts {
            return Err(another());
        }
        // An overlay leaves its lower files' access times alone; that takes owning them.
        let opened = found.open(OFlags::RDONLY | OFlags::NOATIME).or_else(|_| found.open(OFlags::RDONLY))?;
        Ok((opened, seen.0))
    }

    /// Answers a request to read much without a copy, unless the file may have been changed.
    pub(super) fn give(
        &self,
        host: &HostFile,
        (offset, size): (u64, usize),
        device: &Device,
        unique: u64,
        pipe: &mut Pipe,
    ) -> bool {
        let length = host.size.saturating_sub(offset).min(size as u64) as usize;
        let given = (pipe::WORTH_IT..=pipe::MAX_READ).contains(&length)
            && !self.clock.is_changed(host.nodeid, host.since)
            && pipe.answer(device, unique, &host.file, (offset, length));
        self.reads.fetch_add(given.into(), Ordering::Relaxed);
        given
    }

    /// Reads, unless the file may have been changed.
    pub(super) fn read(&self, host: &HostFile, offset: u64, into: &mut [u8]) -> Option<usize> {
        if self.clock.is_changed(host.nodeid, host.since) {
            return None;
        }
        let done = read_at(&host.file, into, offset).ok()?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        Some(done)
    }

    /// The file itself, unless it may have been changed.
    pub(super) fn unchanged<'a>(&self, host: &'a HostFile) -> Option<&'a OwnedFd> {
        (!self.clock.is_changed(host.nodeid, host.since)).then_some(&host.file)
    }

    /// How often something was read here.
    pub(super) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }
}

/// Layer; size and time of change; path.
type Parsed<'a> = (usize, Facts, &'a [u8]);

fn parse(hint: &[u8]) -> Result<Parsed<'_>, Malformed> {
    let mut take = Take::new(hint);
    let (size, seconds, nanoseconds) = (take.u64()?, take.u64()?, take.u32()?);
    let layer = take.u32()? as usize;
    Ok((layer, (size, seconds, nanoseconds), take.rest()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::path::Path;

    use super::*;
    use crate::export::wire::codec::Put;

    fn hint(layer: u32, path: &str, like: &Path) -> Vec<u8> {
        let meta = fs::metadata(like).unwrap();
        let mut hint = Vec::new();
        hint.u64(meta.len()).u64(meta.mtime() as u64).u32(meta.mtime_nsec() as u32).u32(layer);
        hint.bytes(path.as_bytes());
        hint
    }

    #[test]
    fn only_regular_files_beneath_a_layer_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        fs::create_dir_all(layer.join("sub")).unwrap();
        fs::write(layer.join("sub/file"), "inside").unwrap();
        fs::write(dir.path().join("secret"), "outsid").unwrap();
        symlink("../secret", layer.join("link")).unwrap();
        symlink("sub", layer.join("dirlink")).unwrap();
        let shortcut = Shortcut::new(Layers::open(std::slice::from_ref(&layer)).unwrap());
        let inside = layer.join("sub/file");
        let follow = |hint: &[u8]| shortcut.follow(hint, 7, shortcut.now());
        let host = follow(&hint(0, "sub/file", &inside)).unwrap();
        let mut bytes = [0; 10];
        assert_eq!(shortcut.read(&host, 2, &mut bytes), Some(4));
        assert_eq!(&bytes[..4], b"side");
        let secret = dir.path().join("secret");
        lock(&shortcut.places).clear();
        for path in
            ["../secret", "/etc/passwd", "link", "sub/../../secret", "", "sub", "dirlink/file", "sub/\0"]
        {
            assert!(follow(&hint(0, path, &secret)).is_none(), "{path}");
            assert!(follow(&hint(0, path, &inside)).is_none(), "{path}");
        }
        assert!(follow(&hint(1, "sub/file", &inside)).is_none(), "no such layer");
        assert!(follow(&hint(0, "sub/file", &layer)).is_none(), "other facts");
        assert!(follow(b"short").is_none());
        assert!(shortcut.at_hand(7).is_none(), "what is not true is not kept");
        drop(host);
        assert_eq!(shortcut.permits.taken(), 0);
    }

    #[test]
    fn a_changed_file_is_not_read_here() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "text").unwrap();
        let shortcut = Shortcut::new(Layers::open(&[dir.path().to_owned()]).unwrap());
        let host = shortcut.follow(&hint(0, "file", &dir.path().join("file")), 7, shortcut.now()).unwrap();
        let mut read_only = Vec::new();
        read_only.u32(0).u32(0);
        shortcut.note(op::OPEN, 7, &read_only);
        shortcut.note(op::WRITE, 8, &[]);
        assert_eq!(shortcut.read(&host, 0, &mut [0; 9]), Some(4));
        let mut to_write = Vec::new();
        to_write.u32(libc::O_WRONLY as u32).u32(0);
        assert!(shortcut.at_hand(7).is_some(), "what was told once need not be asked for again");
        shortcut.note(op::OPEN, 7, &to_write);
        assert_eq!(shortcut.read(&host, 0, &mut [0; 9]), None);
        assert!(shortcut.at_hand(7).is_none());
    }
}
