//! `--verify`: what was stored, read again, against what the container shows.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use tokio::task::spawn_blocking;
use vmctr_images::commit::Committed;
use vmctr_images::digest::Digest;
use vmctr_images::layer::LayerInfo;
use vmctr_images::store::Layout;
use vmctr_images::tree::Difference;
use vmctr_images::upper::Scope;
use vmctr_images::verify::{Live, blob_in_archive, differences, unpack};

use super::Work;
use super::order::{Files, Image};
use crate::failure::Failure;
use crate::scratch::Scratch;

type Source = Box<dyn Read + Send>;

impl Work<'_> {
    /// Checks the image's new layer, if that is wished.
    pub async fn verify_image(&mut self, image: &Image, made: &Committed) -> Result<(), Failure> {
        if !self.order.verify {
            return Ok(());
        }
        self.progress.phase("reading the layer again");
        let stored = self.stored(image, &made.layer.digest).await?;
        let (stored, layer) = (self.progress.reading(stored), made.layer);
        let unpacked = spawn_blocking(move || scratch(stored, &layer)).await;
        let (scratch, whole) = unpacked.context("reading the layer was interrupted")??;
        if !whole {
            self.report.damaged();
        }
        self.compare(scratch.path().join(LAYER)).await
    }

    /// Checks the new folder, if that is wished.
    pub async fn verify_folder(&mut self, folder: PathBuf) -> Result<(), Failure> {
        if self.order.verify { self.compare(folder).await } else { Ok(()) }
    }

    async fn stored(&self, image: &Image, digest: &Digest) -> Result<Source, Failure> {
        let gone = || anyhow!("The new layer {digest} is not in the store any more");
        Ok(match image {
            Image::Containerd(_) => Box::new(self.store.open(digest).await?.ok_or_else(gone)?),
            Image::Files(Files::Layout(dir), _) => Box::new(Layout::open(dir)?.blob(digest)?),
            Image::Files(Files::Archive(file), _) => {
                let archive = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
                Box::new(blob_in_archive(archive, digest)?.ok_or_else(gone)?)
            }
        })
    }

    /// Compares `changes` on the base with what the container shows.
    async fn compare(&mut self, changes: PathBuf) -> Result<(), Failure> {
        self.progress.phase("comparing with the container");
        let mut folders = vec![changes];
        if self.order.scope == Scope::Changes {
            folders.extend(self.source.folders.iter().skip(1).cloned());
        }
        let (clamp, within) = (self.order.layer.clamp, self.order.subtree.clone());
        let merged = self.source.merged().await?.map(|archive| self.progress.reading(archive));
        let (layers, archive) = (self.source.layers()?, merged);
        let compared = spawn_blocking(move || match archive {
            Some(archive) => differences(&folders, Live::Guest(Box::new(archive)), clamp, &within),
            None => differences(&folders, Live::Folders(&layers), clamp, &within),
        });
        let found: Vec<Difference> = compared.await.context("comparing was interrupted")??;
        self.report.compared(&found);
        Ok(())
    }
}

/// Name of the folder in the scratch.
const LAYER: &str = "layer";

/// The layer's files in a folder of their own, and whether the layer is what was written.
fn scratch(stored: impl Read, layer: &LayerInfo) -> Result<(Scratch, bool), Failure> {
    let scratch = Scratch::new()?;
    let dir = scratch.path().join(LAYER);
    std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let whole = unpack(stored, layer, &dir)?;
    Ok((scratch, whole))
}
