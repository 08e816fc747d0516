//! A mounted export, from its start to its end.
//!
//! ```text
//!   start ─ hello on each stream ─ mount apart ─ INIT ─ threads ─ put in place ──> Serving
//!                                                                                    │
//!                       guest closes, is silent, breaks the protocol ──> Lost: all is answered EIO
//!                                                                                    │
//!                                          unmounted (by whomever), or cut  ──> Ended
//! ```

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::beneath::Beneath;
use super::config::{Cache, Config, Writes};
use super::device::{Device, Gone};
use super::init::{InitError, Offer, asked, of_kernel};
use super::lane::Lane;
use super::layers::Layers;
use super::mount::{Apart, Cut, MountError, MountPlace};
use super::served::Served;
use super::shared::{Lost, OpenFlags, Shared};
use super::shortcut::Shortcut;
use super::through::Through;
use super::upper::Upper;
use crate::export::wire::abi::{MAX_MESSAGE, feature, flag, name, op};
use crate::export::wire::hello::{Hello, HelloError, Lane as Kind, VERSION};
use crate::export::wire::stream::Stream;

/// How often is looked whether the guest takes too long.
const LOOK: Duration = Duration::from_millis(250);

/// The same where a large tree is just being found.
const SOON: Duration = Duration::from_millis(10);

/// Connected streams to the guest, no word said on them.
#[derive(Debug)]
pub struct Streams {
    /// One for each relay thread.
    pub turns: Vec<Stream>,
    /// One for what waits.
    pub waits: Stream,
}

/// A mount that is served.
#[derive(Debug)]
pub struct Export {
    shared: Arc<Shared>,
    cut: Cut,
    place: MountPlace,
    threads: Vec<JoinHandle<()>>,
}

/// What was done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Requests that the guest was asked and that somebody waited for, by their names.
    pub requests: BTreeMap<&'static str, u64>,
    /// Reads that were answered from a file on the host.
    pub host_reads: u64,
    /// Writes that were done on an upper file on the host.
    pub host_writes: u64,
    /// How many files and folders the kernel knows.
    pub nodes: u64,
}

/// The export did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It cannot work as configured.
    #[error("{0}")]
    Config(&'static str),
    /// A layer's folder is missing.
    #[error("Cannot open a lower layer's folder")]
    Layers(#[source] io::Error),
    /// The upper folder is missing.
    #[error("Cannot open the upper folder")]
    Upper(#[source] io::Error),
    /// A stream is no stream.
    #[error("Cannot use a stream to the guest")]
    Stream(#[source] io::Error),
    /// The guest does not play.
    #[error("Cannot agree with the guest on the export")]
    Hello(#[source] HelloError),
    /// The mount failed.
    #[error("Cannot mount the export")]
    Mount(#[source] MountError),
    /// The kernel closed the connection before it began.
    #[error("The kernel gave the mount up")]
    Gone,
    /// Kernel and guest do not go together.
    #[error("Kernel and guest cannot serve the export")]
    Init(#[source] InitError),
    /// The system refuses threads or descriptors.
    #[error("Cannot start the relay's threads")]
    Threads(#[source] io::Error),
}

/// What the guest had was not brought to disk.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// It said no.
    #[error("Not everything could be written to disk")]
    Failed(#[source] io::Error),
    /// It said nothing.
    #[error("The guest did not say in time whether everything is on disk")]
    Silent,
}

impl Export {
    /// Mounts, and serves in threads of its own. The mount is usable when this returns.
    ///
    /// # Errors
    /// As [`StartError`] says; nothing stays behind.
    pub fn start(config: &Config, streams: Streams) -> Result<Self, StartError> {
        check_config(config, &streams)?;
        let layers = Layers::open(&config.layers).map_err(StartError::Layers)?;
        let shortcut = Shortcut::new(layers.clone());
        let served = Served::new(Beneath::new(layers).map_err(StartError::Layers)?);
        let upper = Upper::open(config.upper.as_deref()).map_err(StartError::Upper)?;
        let features = greet(config, &streams)?;
        let apart = Apart::make(config).map_err(StartError::Mount)?;
        let features = init(&apart.device, features, of_kernel(config))?;
        let mut shared = Shared::new(config, open_flags(config), (shortcut, served, upper), streams);
        shared.through = (features & feature::PASSTHROUGH != 0).then(Through::default);
        let shared = Arc::new(shared);
        tracing::debug!(
            features = format!("{features:#x}"),
            lanes = shared.lanes.len(),
            "the export is agreed"
        );
        // Threads that were started end.
        let given_up = |error| {
            shared.give_up(Lost::Closed);
            error
        };
        let threads = start_threads(&shared, &apart.device).map_err(StartError::Threads).map_err(given_up)?;
        let placed = apart.place(config).map_err(StartError::Mount).map_err(given_up);
        let (first, cut, place) = placed?;
        // The kernel holds the connection; the lanes have descriptors of their own.
        drop(first);
        Ok(Self { shared, cut, place, threads })
    }

    /// Why the guest was given up, if it was. The mount is then still there, and all is answered EIO.
    pub fn lost(&self) -> Option<Lost> {
        self.shared.why()
    }

    /// How often the guest was asked, by opcode: what the mount costs is these times the cost of one. What is
    /// answered here, or sent without waiting, does not count.
    pub fn turns(&self) -> Vec<(u32, u64)> {
        let opcodes = (op::LOOKUP..=op::TMPFILE).chain([op::OPEN_READ, op::OPENDIR_READ, op::FIND]);
        opcodes.map(|opcode| (opcode, self.shared.turns.of(opcode))).filter(|(_, count)| *count > 0).collect()
    }

    /// What was asked of the guest, and how often a lower file was read on the host instead.
    pub fn figures(&self) -> Figures {
        let requests = self.turns().into_iter().map(|(opcode, count)| (name(opcode), count));
        let nodes = self.shared.told.count();
        let (reads, host_writes) = self.shared.upper.figures();
        let host_reads = self.shared.shortcut.reads() + reads;
        Figures { requests: requests.collect(), host_reads, host_writes, nodes }
    }

    /// Waits until the mount is gone.
    pub fn wait(mut self) -> Option<Lost> {
        for thread in self.threads.drain(..) {
            // A thread that panicked has answered its last request; the others went on.
            let _ = thread.join();
        }
        let why = self.shared.why();
        self.shared.give_up(Lost::Closed);
        why
    }

    /// Whether the mount is gone.
    pub fn is_gone(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Takes the mount away from its place, whoever uses it; `false` if it is not there any more, or another lies over
    /// it, which then stays.
    ///
    /// # Errors
    /// The place cannot be reached, or as umount(2).
    pub fn take_away(&self) -> io::Result<bool> {
        self.place.take_away()
    }

    /// Cuts the mount off: whatever is asked of it fails with ENOTCONN from now on. It can still be unmounted.
    pub fn cut(&self) {
        self.shared.give_up(Lost::Closed);
        self.cut.cut();
    }

    /// Brings all that the guest has of this export to its disks.
    ///
    /// # Errors
    /// It could not, or did not answer in time.
    pub fn sync(&self) -> Result<(), SyncError> {
        match self.shared.waits.sync(&self.shared).recv_timeout(self.shared.patience) {
            // What was written here was, by the guest, only made and named.
            Ok(0) => self.shared.upper.sync().map_err(SyncError::Failed),
            Ok(errno) => Err(SyncError::Failed(io::Error::from_raw_os_error(errno))),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(SyncError::Silent),
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.cut();
        }
    }
}

fn check_config(config: &Config, streams: &Streams) -> Result<(), StartError> {
    if streams.turns.is_empty() {
        return Err(StartError::Config("An export needs a stream"));
    }
    match (config.writes, config.cache) {
        (Writes::Gathered, Cache::For(_)) => {
            Err(StartError::Config("Writes can be gathered only where nobody else changes the files"))
        }
        (_, Cache::For(_)) if !config.layers.is_empty() || config.upper.is_some() => {
            Err(StartError::Config("Files can be used in their folders only where nobody else changes them"))
        }
        _ => Ok(()),
    }
}

/// Says hello on all streams; what all agreed to.
fn greet(config: &Config, streams: &Streams) -> Result<u64, StartError> {
    let hello = Hello { version: VERSION, lane: Kind::Turns, features: asked(config), export: config.export };
    let waits = Hello { lane: Kind::Waits, ..hello };
    let all = std::iter::once((&waits, &streams.waits)).chain(streams.turns.iter().map(|one| (&hello, one)));
    let mut features = hello.features;
    for (hello, stream) in all {
        let limit = Some(config.patience);
        stream.set_limits(limit, limit).map_err(StartError::Stream)?;
        features &= hello.greet(stream).map_err(StartError::Hello)?;
        // How long an answer may take is watched from outside: some may take longer.
        stream.set_limits(None, limit).map_err(StartError::Stream)?;
    }
    Ok(features)
}

fn init(device: &Device, guest: u64, kernels: u64) -> Result<u64, StartError> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let message = device.next(&mut buffer).map_err(|Gone| StartError::Gone)?;
    let offer = Offer::parse(message).map_err(StartError::Init)?;
    let features = offer.agree(guest).map_err(StartError::Init)? & !feature::PASSTHROUGH | offer.has(kernels);
    device.answer(&offer.answer(features));
    Ok(features)
}

fn open_flags(config: &Config) -> OpenFlags {
    match config.cache {
        Cache::Alone => {
            OpenFlags { file: flag::FOPEN_KEEP_CACHE, folder: flag::FOPEN_KEEP_CACHE | flag::FOPEN_CACHE_DIR }
        }
        Cache::For(_) => OpenFlags { file: 0, folder: 0 },
    }
}

fn start_threads(shared: &Arc<Shared>, first: &Device) -> io::Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    for at in 0..shared.lanes.len() {
        let lane = Lane::new(first.another()?, Arc::clone(shared), at);
        threads.push(Builder::new().name(format!("export-{at}")).spawn(move || lane.run())?);
    }
    let waiting = Arc::clone(shared);
    Builder::new().name("export-waits".into()).spawn(move || waiting.waits.run(&waiting))?;
    let (evicting, device) = (Arc::downgrade(shared), first.another()?);
    Builder::new().name("export-evict".into()).spawn(move || {
        while let Some(shared) = evicting.upgrade() {
            let bound = shared.served.bound();
            if shared.is_lost() || shared.told.evict(&device, bound).is_err() {
                return;
            }
            let soon = shared.told.is_nearly_full(bound);
            drop(shared);
            std::thread::sleep(if soon { SOON } else { LOOK });
        }
    })?;
    let watched = Arc::downgrade(shared);
    Builder::new().name("export-watch".into()).spawn(move || {
        while let Some(shared) = watched.upgrade() {
            shared.check_patience();
            shared.waits.check_interrupted(&shared);
            if shared.is_lost() {
                return;
            }
            drop(shared);
            std::thread::sleep(LOOK);
        }
    })?;
    Ok(threads)
}
