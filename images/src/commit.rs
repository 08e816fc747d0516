//! A commit: from an upper folder to a new folder, a layer and an image.
//!
//! ```text
//!            (frozen)                                        (thawed)
//! upper ── capture ──> new folder ── layer ──> blob ── config, manifest ──> name
//! upper ───────────────────────────── layer ──> blob ── config, manifest ──> name
//! ```
//!
//! With a new folder, which may be that of the new layer's snapshot, only the copy needs the container to
//! stand still: the layer is made from the new folder, which nobody changes. Both ways give the same bytes.
//!
//! Invariant: the image's name is written last. Until then nothing shows but whole blobs.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use tokio::task::spawn_blocking;

use crate::config::{Base, Build, BuildError, Descriptor, Image, build};
use crate::digest::{ChainId, Digest};
use crate::layer::{LayerError, LayerInfo, LayerOptions, LayerWriter, Totals};
use crate::path::TreePath;
use crate::store::containerd::Snapshot;
use crate::store::{Layout, StoreError, containerd, nameless_beside, write_archive};
use crate::tree::{NewFolder, NewFolderError, fill_folder, write_new_folder};
use crate::upper::{Change, Consistency, Layers, Namespace, Notes, Scope, Walk, WalkError};

/// Why a commit fails.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The upper cannot be read.
    #[error("The changes cannot be read")]
    Walk(#[from] WalkError),
    /// The layer cannot be written.
    #[error("The changes cannot become a layer")]
    Layer(#[from] LayerError),
    /// The new folder cannot be written.
    #[error("The changes cannot become a folder")]
    NewFolder(#[from] NewFolderError),
    /// The image cannot be built.
    #[error("The image cannot be built")]
    Build(#[from] BuildError),
    /// The store fails.
    #[error("The image cannot be stored")]
    Store(#[from] StoreError),
    /// containerd fails.
    #[error("The image cannot be stored in containerd")]
    Containerd(#[from] containerd::ContainerdError),
    /// A thread ended.
    #[error("The thread that reads the changes ended")]
    Thread(#[source] tokio::task::JoinError),
    /// The thread that looks for changes ended.
    #[error("The thread that looks for changes ended")]
    Walker,
    /// Whoever watches called it off.
    #[error("The commit was ended early")]
    Watch(#[source] io::Error),
    /// A base layer's blob cannot be read.
    #[error("The base layer {digest} cannot be read")]
    Base {
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is committed.
#[derive(Clone, Copy)]
pub struct Changes<'a> {
    /// The upper and the layers below it.
    pub layers: &'a Layers,
    /// Changes only, or everything for a squashed image.
    pub scope: Scope,
    /// Only what is at or beneath it; the root for all.
    pub subtree: &'a TreePath,
}

impl<'a> Changes<'a> {
    fn walk(&self, consistency: Consistency) -> Result<Walk<'a>, WalkError> {
        Walk::new(self.layers, self.scope, consistency, self.subtree.clone())
    }
}

/// How far a commit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Files of so many bytes were copied.
    Copied(u64),
    /// So much of the layer is written.
    Layer(Totals),
    /// The changes are not read any more.
    Read,
}

/// Told each step. An error ends the commit before the image has a name, or the new folder.
pub type Watch<'a> = dyn FnMut(Step) -> io::Result<()> + Send + 'a;

/// Whether there are at most so many changes, with files of so many bytes together; nothing may change meanwhile.
pub fn few(changes: &Changes<'_>, entries: u64, bytes: u64) -> Result<bool, CommitError> {
    let mut walk = changes.walk(Consistency::Frozen)?;
    let (mut count, mut size) = (0, 0u64);
    while let Some(change) = walk.next_change()? {
        count += 1;
        size = size.saturating_add(change.bytes());
        if count > entries || size > bytes {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Copies the changes to the new folder `dir`, which must not exist.
pub fn capture(
    changes: &Changes<'_>,
    consistency: Consistency,
    namespace: Namespace,
    dir: &Path,
    watch: &mut Watch<'_>,
) -> Result<(NewFolder, Notes), CommitError> {
    let mut walk = changes.walk(consistency)?;
    let mut copied = |bytes| watch(Step::Copied(bytes));
    let written = write_new_folder(&mut walk, dir, namespace, consistency, &mut copied)?;
    Ok((written, walk.notes().clone()))
}

/// Copies the changes to the folder of the new layer's snapshot.
pub fn capture_in_snapshot(
    changes: &Changes<'_>,
    consistency: Consistency,
    snapshot: &Snapshot,
    watch: &mut Watch<'_>,
) -> Result<(NewFolder, Notes), CommitError> {
    let mut walk = changes.walk(consistency)?;
    let mut copied = |bytes| watch(Step::Copied(bytes));
    let written = fill_folder(&mut walk, &snapshot.dir, snapshot.form, consistency, &mut copied)?;
    Ok((written, walk.notes().clone()))
}

/// Changes that were found and not written yet; each may be an open file.
const AHEAD: usize = 64;

/// Writes the changes as a layer to `sink`; nothing may change meanwhile.
///
/// A thread of its own looks for them, as many small files take as long to find as to read.
pub fn layer<W: Write + Send + 'static>(
    changes: &Changes<'_>,
    options: LayerOptions,
    sink: W,
    watch: &mut Watch<'_>,
) -> Result<(W, LayerInfo, Notes), CommitError> {
    let mut writer = LayerWriter::new(sink, options)?;
    let notes = thread::scope(|scope| {
        let (found, queue) = sync_channel(AHEAD);
        let walking = scope.spawn(move || send_all(changes, &found));
        for change in queue {
            let mut told = Ok(());
            writer.add(&change, &mut |totals| {
                if told.is_ok() {
                    told = watch(Step::Layer(totals));
                }
            })?;
            told.map_err(CommitError::Watch)?;
        }
        walking.join().map_err(|_| CommitError::Walker)?
    })?;
    let (sink, info) = writer.finish()?;
    Ok((sink, info, notes))
}

/// Ends early if nobody wants any more.
fn send_all(changes: &Changes<'_>, found: &SyncSender<Change>) -> Result<Notes, CommitError> {
    let mut walk = changes.walk(Consistency::Frozen)?;
    while let Some(change) = walk.next_change()? {
        if found.send(change).is_err() {
            break;
        }
    }
    Ok(walk.notes().clone())
}

/// Finds a blob of the base image; `None` if it is gone.
pub type FetchBlob<'a> = dyn FnMut(&Descriptor) -> io::Result<Option<Box<dyn Read>>> + 'a;

/// A stored image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Config, manifest and layers.
    pub image: Image,
    /// The new layer.
    pub layer: LayerInfo,
    /// What was left out.
    pub notes: Notes,
    /// Base layers whose blobs nobody has: the image cannot be run elsewhere without them.
    pub missing: Vec<Descriptor>,
}

/// An image to be made.
pub struct Plan<'a> {
    /// The files.
    pub changes: Changes<'a>,
    /// How the layer is written.
    pub layer: LayerOptions,
    /// What it is put on.
    pub base: &'a Base,
    /// The config's changes.
    pub build: &'a Build,
    /// The image's name within the store.
    pub tag: Option<&'a str>,
}

/// Makes the image in an OCI layout folder.
pub fn to_layout(
    plan: &Plan<'_>,
    dir: &Path,
    fetch: &mut FetchBlob<'_>,
    watch: &mut Watch<'_>,
) -> Result<Committed, CommitError> {
    let layout = Layout::open(dir)?;
    let (blob, layer, notes) = layer(&plan.changes, plan.layer, layout.begin_blob()?, watch)?;
    watch(Step::Read).map_err(CommitError::Watch)?;
    layout.keep(&blob, &layer.digest)?;
    let image = build(plan.base, &layer, plan.build)?;
    let missing = copy_base(&image, &layout, fetch)?;
    layout.put(&image.config)?;
    layout.put(&image.manifest)?;
    layout.publish(&image.manifest_descriptor, plan.tag)?;
    Ok(Committed { image, layer, notes, missing })
}

/// Copies the base's blobs that the layout does not have; tells those that are nowhere.
fn copy_base(
    image: &Image,
    layout: &Layout,
    fetch: &mut FetchBlob<'_>,
) -> Result<Vec<Descriptor>, CommitError> {
    let mut missing = Vec::new();
    for descriptor in image.layers.iter().filter(|layer| !layout.has(&layer.digest)) {
        match fetched(descriptor, fetch)? {
            Some(mut source) => layout.copy(&descriptor.digest, &mut source)?,
            None => missing.push(descriptor.clone()),
        }
    }
    Ok(missing)
}

fn fetched(descriptor: &Descriptor, fetch: &mut FetchBlob<'_>) -> Result<Option<Box<dyn Read>>, CommitError> {
    fetch(descriptor).map_err(|source| CommitError::Base { digest: descriptor.digest, source })
}

/// Makes the image in a new archive file.
pub fn to_archive(
    plan: &Plan<'_>,
    file: &Path,
    fetch: &mut FetchBlob<'_>,
    watch: &mut Watch<'_>,
) -> Result<Committed, CommitError> {
    let spool = nameless_beside(file)?;
    let (mut spool, layer, notes) = self::layer(&plan.changes, plan.layer, spool, watch)?;
    watch(Step::Read).map_err(CommitError::Watch)?;
    spool.seek(SeekFrom::Start(0)).map_err(|source| StoreError::Write { path: file.to_owned(), source })?;
    let image = build(plan.base, &layer, plan.build)?;
    let (mut sources, mut missing) = (Vec::new(), Vec::new());
    for descriptor in &image.layers[..image.layers.len() - 1] {
        match fetched(descriptor, fetch)? {
            Some(source) => sources.push((descriptor.clone(), source)),
            None => missing.push(descriptor.clone()),
        }
    }
    let (mut config, mut manifest) = (image.config.as_slice(), image.manifest.as_slice());
    let mut blobs: Vec<(Descriptor, &mut dyn Read)> = Vec::new();
    blobs
        .extend(sources.iter_mut().map(|(descriptor, source)| (descriptor.clone(), source as &mut dyn Read)));
    blobs.extend(image.layers.last().map(|new| (new.clone(), &mut spool as &mut dyn Read)));
    blobs.push((image.config_descriptor.clone(), &mut config));
    blobs.push((image.manifest_descriptor.clone(), &mut manifest));
    write_archive(file, &image.manifest_descriptor, plan.tag, &mut blobs)?;
    drop(blobs);
    Ok(Committed { image, layer, notes, missing })
}

/// Makes the image in containerd, with the snapshot of its new layer.
///
/// The layers are taken over because a thread of their own reads them.
pub async fn to_containerd(
    store: &containerd::Store,
    order: ContainerdOrder,
    watch: Box<Watch<'static>>,
) -> Result<Committed, CommitError> {
    let ContainerdOrder { layers, scope, subtree, layer, base, build: changes, name, unpack } = order;
    let reading = Reading { layers: Arc::new(layers), scope, subtree };
    let (info, notes, watch) = match reading.clone().layer_in(store, layer, watch).await {
        Ok(written) => written,
        Err(error) => {
            unpack.give_up(store).await?;
            return Err(error);
        }
    };
    let image = match build(&base, &info, &changes) {
        Ok(image) => image,
        Err(error) => {
            unpack.give_up(store).await?;
            return Err(error.into());
        }
    };
    let unpacked = unpack.finish(store, &image, reading).await?;
    read_all(watch).await?;
    let missing = store.publish(&image, &name, unpacked.as_deref()).await?;
    Ok(Committed { image, layer: info, notes, missing })
}

/// What [`to_containerd`] makes.
pub struct ContainerdOrder {
    /// The upper and the layers below it.
    pub layers: Layers,
    /// Changes only, or everything for a squashed image.
    pub scope: Scope,
    /// Only what is at or beneath it; the root for all.
    pub subtree: TreePath,
    /// How the layer is written.
    pub layer: LayerOptions,
    /// What it is put on.
    pub base: Base,
    /// The config's changes.
    pub build: Build,
    /// The image's name.
    pub name: String,
    /// The new layer's snapshot.
    pub unpack: Unpack,
}

/// Where the new layer is to be unpacked at once.
pub enum Unpack {
    /// Nowhere.
    No,
    /// By this snapshotter.
    By(String),
    /// It is, by [`capture_in_snapshot`]: the changes are read from there.
    Done(Snapshot),
}

impl Unpack {
    async fn give_up(self, store: &containerd::Store) -> Result<(), CommitError> {
        match self {
            Self::Done(snapshot) => Ok(store.drop_snapshot(snapshot).await?),
            Self::No | Self::By(_) => Ok(()),
        }
    }

    /// Which snapshotter has the new layer afterwards.
    async fn finish(
        self,
        store: &containerd::Store,
        image: &Image,
        reading: Reading,
    ) -> Result<Option<String>, CommitError> {
        let Some(name) = image.chain_id() else { return Ok(None) };
        match self {
            Self::No => Ok(None),
            Self::Done(snapshot) => {
                let snapshotter = snapshot.snapshotter.clone();
                store.commit_snapshot(snapshot, &name).await?;
                Ok(Some(snapshotter))
            }
            Self::By(snapshotter) => {
                let there = reading.unpack(store, image, &name, &snapshotter).await?;
                Ok(there.then_some(snapshotter))
            }
        }
    }
}

/// [`Changes`] for threads.
#[derive(Clone)]
struct Reading {
    layers: Arc<Layers>,
    scope: Scope,
    subtree: TreePath,
}

impl Reading {
    fn changes(&self) -> Changes<'_> {
        Changes { layers: &self.layers, scope: self.scope, subtree: &self.subtree }
    }

    /// Writes the layer into a blob.
    async fn layer_in(
        self,
        store: &containerd::Store,
        options: LayerOptions,
        mut watch: Box<Watch<'static>>,
    ) -> Result<(LayerInfo, Notes, Box<Watch<'static>>), CommitError> {
        let (sink, source) = containerd::pipe();
        let mut ingest = store.begin().await?;
        let writing = spawn_blocking(move || {
            let written = layer(&self.changes(), options, sink, &mut *watch);
            written.map(|(_, info, notes)| (info, notes, watch))
        });
        let taken = ingest.take(source).await;
        let written = writing.await.map_err(CommitError::Thread)?;
        // Whose error came first: containerd's ends the pipe, and the writer then fails for that reason only.
        let (info, notes, watch) = match (written, taken) {
            (Ok(done), Ok(())) => done,
            (written, taken) => {
                // The first error is the one to report; what is left belongs to the lease.
                let _ = ingest.abort().await;
                taken?;
                drop(written?);
                return Err(containerd::ContainerdError::Ended.into());
            }
        };
        ingest.commit(&info.digest, containerd::Store::layer_labels(&info.diff_id)).await?;
        Ok((info, notes, watch))
    }

    /// Fills the new layer's snapshot; whether it is there afterwards.
    async fn unpack(
        self,
        store: &containerd::Store,
        image: &Image,
        name: &ChainId,
        snapshotter: &str,
    ) -> Result<bool, CommitError> {
        if store.has_snapshot(snapshotter, name).await? {
            return Ok(true);
        }
        let parent = image.parent_chain_id();
        let Some(snapshot) = store.prepare(snapshotter, parent.as_ref()).await? else { return Ok(false) };
        let (dir, form) = (snapshot.dir.clone(), snapshot.form);
        let filling = spawn_blocking(move || {
            let mut walk = self.changes().walk(Consistency::Frozen)?;
            fill_folder(&mut walk, &dir, form, Consistency::Frozen, &mut |_| Ok(()))
                .map_err(CommitError::from)
                .map(drop)
        });
        match filling.await.map_err(CommitError::Thread)? {
            Ok(()) => store.commit_snapshot(snapshot, name).await?,
            Err(error) => {
                store.drop_snapshot(snapshot).await?;
                return Err(error);
            }
        }
        Ok(true)
    }
}

async fn read_all(mut watch: Box<Watch<'static>>) -> Result<(), CommitError> {
    let told = spawn_blocking(move || watch(Step::Read)).await;
    told.map_err(CommitError::Thread)?.map_err(CommitError::Watch)
}
