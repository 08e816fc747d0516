//! A commit: from an upper folder to a new folder, a layer and an image.
//!
//! ```text
//!            (frozen)                                        (thawed)
//! upper ── capture ──> new folder ── layer ──> blob ── config, manifest ──> name
//! upper ───────────────────────────── layer ──> blob ── config, manifest ──> name
//! ```
//!
//! With a new folder, only the copy needs the container to stand still: the layer is made from the new
//! folder, which nobody changes. Both ways give the same bytes.
//!
//! Invariant: the image's name is written last. Until then nothing shows but whole blobs.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::config::{Base, Build, BuildError, Descriptor, Image, build};
use crate::digest::Digest;
use crate::layer::{LayerError, LayerInfo, LayerOptions, LayerWriter, Totals};
use crate::path::TreePath;
use crate::store::{Layout, StoreError, containerd, nameless_beside, write_archive};
use crate::tree::{NewFolder, NewFolderError, fill_folder, write_new_folder};
use crate::upper::{Consistency, Layers, Namespace, Notes, Scope, Walk, WalkError};

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
    /// A base layer's blob cannot be read.
    #[error("The base layer {digest} cannot be read")]
    Base {
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: std::io::Error,
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

/// Copies the changes to the new folder `dir`, which must not exist.
pub fn capture(
    changes: &Changes<'_>,
    consistency: Consistency,
    namespace: Namespace,
    dir: &Path,
) -> Result<(NewFolder, Notes), CommitError> {
    let mut walk = changes.walk(consistency)?;
    let written = write_new_folder(&mut walk, dir, namespace, consistency)?;
    Ok((written, walk.notes().clone()))
}

/// Writes the changes as a layer to `sink`; nothing may change meanwhile.
pub fn layer<W: Write>(
    changes: &Changes<'_>,
    options: LayerOptions,
    sink: W,
    progress: &mut dyn FnMut(Totals),
) -> Result<(W, LayerInfo, Notes), CommitError> {
    let mut walk = changes.walk(Consistency::Frozen)?;
    let mut writer = LayerWriter::new(sink, options)?;
    while let Some(change) = walk.next_change()? {
        writer.add(&change, progress)?;
    }
    let (sink, info) = writer.finish()?;
    Ok((sink, info, walk.notes().clone()))
}

/// Finds a blob of the base image; `None` if it is gone.
pub type FetchBlob<'a> = dyn FnMut(&Descriptor) -> std::io::Result<Option<Box<dyn Read>>> + 'a;

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
    progress: &mut dyn FnMut(Totals),
) -> Result<Committed, CommitError> {
    let layout = Layout::open(dir)?;
    let (blob, layer, notes) = layer(&plan.changes, plan.layer, layout.begin_blob()?, progress)?;
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
    progress: &mut dyn FnMut(Totals),
) -> Result<Committed, CommitError> {
    let spool = nameless_beside(file)?;
    let (mut spool, layer, notes) = self::layer(&plan.changes, plan.layer, spool, progress)?;
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
) -> Result<Committed, CommitError> {
    let ContainerdOrder { layers, scope, subtree, layer, base, build: changes, name, snapshotter } = order;
    let layers = std::sync::Arc::new(layers);
    let (sink, source) = containerd::pipe();
    let mut ingest = store.begin().await?;
    let writing = {
        let (layers, subtree) = (std::sync::Arc::clone(&layers), subtree.clone());
        tokio::task::spawn_blocking(move || {
            let changes = Changes { layers: &layers, scope, subtree: &subtree };
            self::layer(&changes, layer, sink, &mut |_| {}).map(|(_, info, notes)| (info, notes))
        })
    };
    let taken = ingest.take(source).await;
    let written = writing.await.map_err(CommitError::Thread)?;
    // The writer's own error says more than that of the stream which ended with it.
    let (info, notes) = match (written, taken) {
        (Ok(done), Ok(())) => done,
        (written, taken) => {
            ingest.abort().await?;
            written?;
            taken?;
            return Err(containerd::ContainerdError::Ended.into());
        }
    };
    ingest.commit(&info.digest, containerd::Store::layer_labels(&info.diff_id)).await?;
    let image = build(&base, &info, &changes)?;
    let unpacked = snapshot(store, &image, layers, scope, subtree, snapshotter.as_deref()).await?;
    let snapshotter = snapshotter.filter(|_| unpacked);
    let missing = store.publish(&image, &name, snapshotter.as_deref()).await?;
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
    /// Where the new layer is to be unpacked at once.
    pub snapshotter: Option<String>,
}

/// Fills the new layer's snapshot; whether it is there afterwards.
async fn snapshot(
    store: &containerd::Store,
    image: &Image,
    layers: std::sync::Arc<Layers>,
    scope: Scope,
    subtree: TreePath,
    snapshotter: Option<&str>,
) -> Result<bool, CommitError> {
    let (Some(snapshotter), Some(name)) = (snapshotter, image.chain_id()) else { return Ok(false) };
    let Some(snapshot) = store.prepare(snapshotter, image.parent_chain_id().as_ref(), &name).await? else {
        return Ok(store.has_snapshot(snapshotter, &name).await?);
    };
    let (dir, form) = (snapshot.dir.clone(), snapshot.form);
    let filling = tokio::task::spawn_blocking(move || {
        let changes = Changes { layers: &layers, scope, subtree: &subtree };
        let mut walk = changes.walk(Consistency::Frozen)?;
        fill_folder(&mut walk, &dir, form, Consistency::Frozen).map_err(CommitError::from).map(drop)
    });
    match filling.await.map_err(CommitError::Thread)? {
        Ok(()) => store.commit_snapshot(snapshot, &name).await?,
        Err(error) => {
            store.drop_snapshot(snapshot).await?;
            return Err(error);
        }
    }
    Ok(true)
}
