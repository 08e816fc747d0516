//! What the user decides about a mount.

use std::path::PathBuf;
use std::time::Duration;

use rustix::mount::MountAttrFlags;

/// A mount of an export.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it is mounted. A path without symbolic links, as are those of the folders below.
    pub mountpoint: PathBuf,
    /// What `/proc/mounts` names as its source.
    pub source: String,
    /// Restrictions, as mount(8) has them. Set-user-ID programs and devices are refused unless asked for: the
    /// guest could make them up.
    pub restrictions: MountAttrFlags,
    /// Whether other users than the one who mounts see it. What they may do there, permissions say.
    pub allow_other: bool,
    /// What is remembered.
    pub cache: Cache,
    /// How writes go.
    pub writes: Writes,
    /// The host's folders that are the lower layers, from the top, in the order of the guest's. Their files are read
    /// there, and folders of one layer found and listed. Empty: all through the guest. Only with [`Cache::Alone`].
    pub layers: Vec<PathBuf>,
    /// The host's folder that changes land in. What files of it hold is read and written there. `None`: through the
    /// guest. Only with [`Cache::Alone`], and if nobody else changes the folder.
    pub upper: Option<PathBuf>,
    /// How long the guest may take to answer a request before it is given up for lost. It may take thirty times that
    /// if it gives signs of life, and for locks longer still.
    pub patience: Duration,
    /// Which of the guest's exports is mounted.
    pub export: u32,
    /// How many files the kernel may know before it is made to forget some: each is open in the guest, and in the
    /// share's daemon.
    pub most_nodes: u64,
    /// How many entries one listing of a folder may have. Endless ones are the guest's invention.
    pub most_entries: u64,
}

/// How long the kernel remembers names, attributes and contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Without limit: nothing changes but through this mount.
    Alone,
    /// For so long: others change files too, such as the processes of a container.
    For(Duration),
}

/// How writes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// Each to the guest at once: a full disk is told to who wrote.
    Through,
    /// Gathered by the kernel and sent later, as a disk file system does. A full disk is told by fsync or close.
    /// Only right with [`Cache::Alone`].
    Gathered,
}

/// A third of what a process may open: the daemon runs under the same limit, and has folders open once for each layer.
fn most_nodes() -> u64 {
    const PLENTY: u64 = 1 << 20;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    limit.unwrap_or(PLENTY).min(PLENTY) / 3
}

impl Config {
    /// A mount for one writer, with the usual restrictions.
    pub fn new(mountpoint: PathBuf) -> Self {
        Self {
            mountpoint,
            source: "vmctr".to_owned(),
            restrictions: MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
            allow_other: true,
            cache: Cache::Alone,
            writes: Writes::Through,
            layers: Vec::new(),
            upper: None,
            patience: Duration::from_secs(120),
            export: 0,
            most_nodes: most_nodes(),
            most_entries: 1 << 24,
        }
    }
}
