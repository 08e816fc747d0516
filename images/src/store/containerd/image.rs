//! Config, manifest and image record, with the labels by which containerd's garbage collection knows
//! what belongs together.

use std::collections::HashMap;

use containerd_client::services::v1::{CreateImageRequest, Image as Record, UpdateImageRequest};
use containerd_client::tonic::Code;
use containerd_client::types::Descriptor as Target;
use prost_types::FieldMask;

use super::{ContainerdError, Doing, Store};
use crate::config::{Descriptor, Image};
use crate::digest::DiffId;

/// What a layer's blob says of itself: containerd need not decompress it to find its snapshot.
pub(super) fn layer_labels(diff_id: &DiffId) -> HashMap<String, String> {
    HashMap::from([("containerd.io/uncompressed".to_owned(), diff_id.to_string())])
}

impl Store {
    /// The labels of a new layer's blob.
    pub fn layer_labels(diff_id: &DiffId) -> HashMap<String, String> {
        layer_labels(diff_id)
    }

    /// Stores config and manifest, then names the image; tells which of its layers are missing.
    pub async fn publish(
        &self,
        image: &Image,
        name: &str,
        snapshotter: Option<&str>,
    ) -> Result<Vec<Descriptor>, ContainerdError> {
        let mut missing = Vec::new();
        for layer in &image.layers {
            if !self.has(&layer.digest).await? {
                missing.push(layer.clone());
            }
        }
        self.put(&image.config, config_labels(image, snapshotter)).await?;
        self.put(&image.manifest, manifest_labels(image, &missing)).await?;
        self.record(image, name).await?;
        Ok(missing)
    }

    async fn record(&self, image: &Image, name: &str) -> Result<(), ContainerdError> {
        let record = Record {
            name: name.to_owned(),
            target: Some(target(&image.manifest_descriptor)),
            ..Record::default()
        };
        let create =
            self.request(CreateImageRequest { image: Some(record.clone()), ..Default::default() })?;
        match self.client.images().create(create).await {
            Err(status) if status.code() == Code::AlreadyExists => {}
            result => return result.doing("name the image").map(drop),
        }
        let update = self.request(UpdateImageRequest {
            image: Some(record),
            update_mask: Some(FieldMask { paths: vec!["target".into()] }),
            ..Default::default()
        })?;
        self.client.images().update(update).await.doing("give the name to the new image").map(drop)
    }
}

fn target(descriptor: &Descriptor) -> Target {
    Target {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: descriptor.size as i64,
        ..Target::default()
    }
}

fn config_labels(image: &Image, snapshotter: Option<&str>) -> HashMap<String, String> {
    let chain = image.chain_id().map(|chain| chain.to_string());
    let label = snapshotter.zip(chain);
    label.map(|(name, chain)| (format!("containerd.io/gc.ref.snapshot.{name}"), chain)).into_iter().collect()
}

fn manifest_labels(image: &Image, missing: &[Descriptor]) -> HashMap<String, String> {
    let present = image.layers.iter().enumerate().filter(|(_, layer)| !missing.contains(layer));
    let layers = present.map(|(number, layer)| {
        (format!("containerd.io/gc.ref.content.l.{number}"), layer.digest.to_string())
    });
    let config =
        ("containerd.io/gc.ref.content.config".to_owned(), image.config_descriptor.digest.to_string());
    layers.chain([config]).collect()
}
