//! The image itself, in the store that was asked for.

use std::io::{self, Read};

use anyhow::Context as _;
use containerd_client::Client;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use vmctr_images::commit::{Changes, Committed, ContainerdOrder, Plan, to_archive, to_containerd, to_layout};
use vmctr_images::config::{Base, Descriptor};
use vmctr_images::store::containerd::Store;
use vmctr_images::upper::Layers;

use super::super::Context;
use super::{Files, Order};
use crate::failure::Failure;

/// An image to be made, with all that goes into it.
pub struct Making<'a> {
    pub layers: Layers,
    pub base: Base,
    pub order: &'a Order,
}

impl Making<'_> {
    /// Makes it in containerd, under a lease that ends with the work.
    pub async fn in_containerd(
        self,
        context: &Context,
        client: Client,
        name: &str,
        snapshotter: Option<String>,
    ) -> Result<Committed, Failure> {
        let store = Store::lease(client, &context.namespace).await?;
        let order = ContainerdOrder {
            layers: self.layers,
            scope: self.order.scope,
            subtree: self.order.subtree.clone(),
            layer: self.order.layer,
            base: self.base,
            build: self.order.build.clone(),
            name: name.to_owned(),
            snapshotter,
        };
        let made = to_containerd(&store, order).await;
        let released = store.release().await;
        let made = made?;
        released?;
        Ok(made)
    }

    /// Makes it in a folder or a file. The base's blobs come from containerd.
    pub async fn in_files(
        self,
        store: Store,
        files: Files,
        tag: Option<String>,
    ) -> Result<Committed, Failure> {
        let Self { layers, base, order } = self;
        let (scope, subtree, layer) = (order.scope, order.subtree.clone(), order.layer);
        let build = order.build.clone();
        let make = move || {
            let changes = Changes { layers: &layers, scope, subtree: &subtree };
            let plan = Plan { changes, layer, base: &base, build: &build, tag: tag.as_deref() };
            let mut fetch = |blob: &Descriptor| fetch(&store, blob);
            match &files {
                Files::Layout(dir) => to_layout(&plan, dir, &mut fetch, &mut |_| {}),
                Files::Archive(file) => to_archive(&plan, file, &mut fetch, &mut |_| {}),
            }
        };
        Ok(spawn_blocking(make).await.context("writing was interrupted")??)
    }
}

fn fetch(store: &Store, blob: &Descriptor) -> io::Result<Option<Box<dyn Read>>> {
    let blob = Handle::current().block_on(store.open(&blob.digest)).map_err(io::Error::other)?;
    Ok(blob.map(|blob| Box::new(blob) as Box<dyn Read>))
}
