//! The changes, copied to where nobody changes them, so that the container runs on while they are packed.
//!
//! ```text
//!   --to-dir DIR                      the new folder itself
//!   containerd, overlay snapshotter   the new layer's snapshot, prepared before the container stands still
//!   --pause=false, or few changes     a folder in /var/tmp
//!   otherwise                         nowhere: the layer is made from the upper
//! ```

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::task::spawn_blocking;
use vmctr_images::commit::{Changes, capture, capture_in_snapshot, few};
use vmctr_images::config::Base;
use vmctr_images::digest::ChainId;
use vmctr_images::store::containerd::{Snapshot, Store};
use vmctr_images::upper::{Consistency, Namespace, Scope};

use super::Work;
use super::order::{Image, Order};
use crate::container::Container;
use crate::failure::Failure;
use crate::scratch::Scratch;

const FEW_ENTRIES: u64 = 1000;
const FEW_BYTES: u64 = 64 << 20;

/// Where the changes were copied to.
pub enum Staged {
    /// Nowhere.
    No,
    /// A folder.
    Folder {
        /// Which.
        dir: PathBuf,
        /// Removed in the end, if it is ours.
        _temporary: Option<Scratch>,
    },
    /// The new layer's snapshot.
    Snapshot(Snapshot),
}

impl Staged {
    /// Whether the upper is not needed any more.
    pub fn holds_changes(&self) -> bool {
        !matches!(self, Self::No)
    }

    /// Where the changes are.
    pub fn folder(&self) -> Option<&PathBuf> {
        match self {
            Self::No => None,
            Self::Folder { dir, .. } => Some(dir),
            Self::Snapshot(snapshot) => Some(&snapshot.dir),
        }
    }
}

/// Prepares the new layer's snapshot, if it can take the changes as they are.
pub async fn prepare(
    store: &Store,
    container: &Container,
    base: &Base,
    order: &Order,
) -> Result<Option<Snapshot>, Failure> {
    let wanted = matches!(order.image, Some(Image::Containerd(_)))
        && order.scope == Scope::Changes
        && order.to_dir.is_none()
        && !container.snapshotter.is_empty();
    match ChainId::of(base.diff_ids()).filter(|_| wanted) {
        Some(parent) => Ok(store.prepare_for_changes(&container.snapshotter, &parent).await?),
        None => Ok(None),
    }
}

impl Work<'_> {
    /// Copies the changes, if that shortens the pause or if they may change while they are read.
    pub async fn stage(&mut self, snapshot: Option<Snapshot>) -> Result<Staged, Failure> {
        self.progress.phase("copying the changes");
        if let Some(snapshot) = snapshot {
            return self.in_snapshot(snapshot).await;
        }
        let (dir, temporary) = match &self.order.to_dir {
            Some(dir) => (std::path::absolute(dir)?, None),
            None if self.source.consistency == Consistency::Live || self.few_changes()? => {
                let temporary = Scratch::new()?;
                (temporary.path().join("changes"), Some(temporary))
            }
            None => return Ok(Staged::No),
        };
        self.in_folder(&dir).await?;
        Ok(Staged::Folder { dir, _temporary: temporary })
    }

    /// Whether somebody waits, and copying what changed takes no longer than looking at it.
    fn few_changes(&self) -> Result<bool, Failure> {
        if self.order.verify || self.source.scope != Scope::Changes || !self.source.still.holds() {
            return Ok(false);
        }
        let (layers, subtree) = (self.source.layers()?, &self.order.subtree);
        let changes = Changes { layers: &layers, scope: self.source.scope, subtree };
        Ok(few(&changes, FEW_ENTRIES, FEW_BYTES)?)
    }

    async fn in_snapshot(&mut self, snapshot: Snapshot) -> Result<Staged, Failure> {
        let (layers, consistency) = (self.source.layers()?, self.source.consistency);
        let (scope, subtree) = (self.source.scope, self.order.subtree.clone());
        let mut watch = self.watch();
        let copied = spawn_blocking(move || {
            let changes = Changes { layers: &layers, scope, subtree: &subtree };
            capture_in_snapshot(&changes, consistency, &snapshot, &mut *watch)
                .map(|copied| (snapshot, copied))
        });
        let (snapshot, (folder, notes)) = copied.await.context("copying was interrupted")??;
        self.report.notes(&notes);
        self.report.changed(&folder.changed);
        Ok(Staged::Snapshot(snapshot))
    }

    async fn in_folder(&mut self, dir: &Path) -> Result<(), Failure> {
        let (layers, consistency) = (self.source.layers()?, self.source.consistency);
        let (scope, subtree, to) = (self.source.scope, self.order.subtree.clone(), dir.to_owned());
        let mut watch = self.watch();
        let copied = spawn_blocking(move || {
            let changes = Changes { layers: &layers, scope, subtree: &subtree };
            capture(&changes, consistency, Namespace::Trusted, &to, &mut *watch)
        });
        let (folder, notes) = copied.await.context("copying was interrupted")??;
        self.report.notes(&notes);
        self.report.changed(&folder.changed);
        if self.order.to_dir.is_some() {
            self.report.folder(dir, folder.entries);
        }
        Ok(())
    }
}
