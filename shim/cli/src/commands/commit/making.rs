//! The image itself, in the store that was asked for.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use vmctr_images::commit::{
    Changes, Committed, ContainerdOrder, Plan, Step, Unpack, Watch, to_archive, to_containerd, to_layout,
};
use vmctr_images::config::Descriptor;
use vmctr_images::layer::Totals;
use vmctr_images::store::containerd::Store;
use vmctr_images::upper::{Layers, Namespace, Scope};

use super::Work;
use super::order::{Files, Image};
use super::staging::Staged;
use crate::failure::Failure;

impl Work<'_> {
    /// Makes it.
    pub async fn make(&mut self, image: &Image, staged: Staged) -> Result<Committed, Failure> {
        self.progress.phase("writing the layer");
        let layers = Layers::open(self.folders(staged.folder()), Namespace::Trusted)?;
        match image {
            Image::Containerd(name) => self.in_containerd(name, layers, staged).await,
            Image::Files(files, tag) => {
                let made = self.in_files(files.clone(), tag.clone(), layers).await;
                drop(staged);
                made
            }
        }
    }

    /// The folders that the layer is made from, topmost first.
    fn folders(&self, changes: Option<&PathBuf>) -> Vec<PathBuf> {
        let mut folders = self.source.folders.clone();
        if let (Some(changes), Scope::Changes, Some(upper)) = (changes, self.order.scope, folders.first_mut())
        {
            upper.clone_from(changes);
        }
        folders
    }

    async fn in_containerd(&self, name: &str, layers: Layers, staged: Staged) -> Result<Committed, Failure> {
        let snapshotter = self.source.container.snapshotter.clone();
        let unpack = match staged {
            Staged::Snapshot(snapshot) => Unpack::Done(snapshot),
            _ if snapshotter.is_empty() => Unpack::No,
            _ => Unpack::By(snapshotter),
        };
        let order = ContainerdOrder {
            layers,
            scope: self.order.scope,
            subtree: self.order.subtree.clone(),
            layer: self.order.layer,
            base: self.base.clone(),
            build: self.order.build.clone(),
            name: name.to_owned(),
            unpack,
        };
        Ok(to_containerd(self.store, order, self.watch()).await?)
    }

    /// Makes it in a folder or a file. The base's blobs come from containerd.
    async fn in_files(
        &self,
        files: Files,
        tag: Option<String>,
        layers: Layers,
    ) -> Result<Committed, Failure> {
        let (scope, subtree, layer) = (self.order.scope, self.order.subtree.clone(), self.order.layer);
        let (build, base) = (self.order.build.clone(), self.base.clone());
        let (store, mut watch) = (Arc::clone(self.store), self.watch());
        let make = move || {
            let changes = Changes { layers: &layers, scope, subtree: &subtree };
            let plan = Plan { changes, layer, base: &base, build: &build, tag: tag.as_deref() };
            let mut fetch = |blob: &Descriptor| fetch(&store, blob);
            match &files {
                Files::Layout(dir) => to_layout(&plan, dir, &mut fetch, &mut *watch),
                Files::Archive(file) => to_archive(&plan, file, &mut fetch, &mut *watch),
            }
        };
        Ok(spawn_blocking(make).await.context("writing was interrupted")??)
    }

    /// Shows how far it is, and lets the container go once all is read.
    pub fn watch(&self) -> Box<Watch<'static>> {
        let (mut count, still) = (self.progress.counter(), self.source.still.clone());
        let go_on = self.wanted.asker();
        let (runtime, verify) = (Handle::current(), self.order.verify);
        Box::new(move |step| {
            go_on()?;
            match step {
                Step::Copied(bytes) | Step::Layer(Totals { bytes, .. }) => count(bytes),
                Step::Read if verify => {}
                Step::Read => runtime.block_on(still.release()).map_err(io::Error::other)?,
            }
            Ok(())
        })
    }
}

fn fetch(store: &Store, blob: &Descriptor) -> io::Result<Option<Box<dyn Read>>> {
    let blob = Handle::current().block_on(store.open(&blob.digest)).map_err(io::Error::other)?;
    Ok(blob.map(|blob| Box::new(blob) as Box<dyn Read>))
}
