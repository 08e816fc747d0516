//! `vmctr layer ls|verify FILE|REF`: what is in a layer, and whether it is what its digest says.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use tokio::task::spawn_blocking;
use vmctr_images::digest::{DiffId, Digest};
use vmctr_images::layer::{Item, ItemKind, LayerReader};
use vmctr_images::store::containerd::Store;

use super::Context;
use crate::cli::LayerVerb;
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;

/// No layer has more bytes.
const LIMIT: u64 = 1 << 50;

/// A layer to be read, and what it should be.
struct Layer {
    name: String,
    source: Box<dyn Read + Send>,
    digest: Option<Digest>,
    diff_id: Option<DiffId>,
}

/// An entry of a layer.
#[derive(Serialize)]
struct Entry {
    kind: &'static str,
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

/// What a layer turned out to be.
#[derive(Serialize)]
struct Verified {
    layer: String,
    digest: Option<String>,
    diff_id: Option<String>,
    size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Does what the verb says.
pub async fn run(context: &Context, verb: LayerVerb) -> Outcome {
    match verb {
        LayerVerb::Ls(args) => {
            let layer = layers(context, &args.source).await?.pop();
            let layer = layer.ok_or_else(|| anyhow!("{} has no layers", args.source))?;
            let entries =
                spawn_blocking(move || entries(layer)).await.context("reading was interrupted")??;
            list(context, &entries)?;
            Ok(Verdict::Good)
        }
        LayerVerb::Verify(args) => {
            let layers = layers(context, &args.source).await?;
            let verify = move || layers.into_iter().map(verify).collect::<Vec<_>>();
            let verified = spawn_blocking(verify).await.context("reading was interrupted")?;
            tell(context, &verified)?;
            let good = verified.iter().all(|layer| layer.problem.is_none());
            Ok(if good { Verdict::Good } else { Verdict::Bad })
        }
    }
}

/// The layer in a file, or those of an image, lowest first.
async fn layers(context: &Context, source: &str) -> Result<Vec<Layer>, Failure> {
    if Path::new(source).is_file() {
        let file = File::open(source).with_context(|| format!("{source} cannot be read"))?;
        let name = source.to_owned();
        return Ok(vec![Layer { name, source: Box::new(file), digest: None, diff_id: None }]);
    }
    let store = Store::reader(context.containerd().await?, &context.namespace);
    let missing = || {
        let namespace = &context.namespace;
        let error = anyhow!("{source} is no file, and no image in containerd's namespace {namespace}");
        Failure::not_found(error).hint(format!("`ctr -n {namespace} images ls` lists the images"))
    };
    let stored = store.image(source).await?.ok_or_else(missing)?;
    let mut layers = vec![];
    for (blob, diff_id) in stored.base.layers().iter().zip(&stored.diff_ids) {
        let reader = store.open(&blob.digest).await?;
        let reader = reader.ok_or_else(|| anyhow!("Layer {} is not in containerd", blob.digest))?;
        layers.push(Layer {
            name: blob.digest.to_string(),
            source: Box::new(reader),
            digest: Some(blob.digest),
            diff_id: Some(*diff_id),
        });
    }
    Ok(layers)
}

fn entries(layer: Layer) -> Result<Vec<Entry>, Failure> {
    let mut reader = LayerReader::new(layer.source, LIMIT)?;
    let mut entries = vec![];
    while let Some(item) = reader.next_item()? {
        entries.push(entry(&item));
    }
    reader.finish()?;
    Ok(entries)
}

fn entry(item: &Item) -> Entry {
    let (kind, size, target) = match &item.kind {
        ItemKind::Dir => ("folder", 0, None),
        ItemKind::File(size) => ("file", *size, None),
        ItemKind::Link(first) => ("link", 0, Some(first.to_string())),
        ItemKind::Symlink(to) => {
            ("symlink", 0, Some(String::from_utf8_lossy(to).escape_default().to_string()))
        }
        ItemKind::Char(_) => ("char", 0, None),
        ItemKind::Block(_) => ("block", 0, None),
        ItemKind::Fifo => ("fifo", 0, None),
        ItemKind::Whiteout => ("whiteout", 0, None),
        ItemKind::Opaque => ("opaque", 0, None),
    };
    let meta = &item.meta;
    let (uid, gid) = (meta.uid, meta.gid);
    Entry { kind, mode: format!("{:04o}", meta.mode), uid, gid, size, path: item.path.to_string(), target }
}

fn list(context: &Context, entries: &[Entry]) -> anyhow::Result<()> {
    if context.json {
        return output::json(&entries);
    }
    let row = |entry: &Entry| {
        let path = match &entry.target {
            Some(target) => format!("{} -> {target}", entry.path),
            None => entry.path.clone(),
        };
        let owner = format!("{}:{}", entry.uid, entry.gid);
        vec![entry.kind.to_owned(), entry.mode.clone(), owner, entry.size.to_string(), path]
    };
    output::print_line(&output::table(&["KIND", "MODE", "OWNER", "SIZE", "PATH"], entries.iter().map(row)))
}

fn verify(layer: Layer) -> Verified {
    let Layer { name, source, digest, diff_id } = layer;
    match LayerReader::new(source, LIMIT).and_then(LayerReader::finish) {
        Err(error) => {
            let problem = Some(crate::failure::one_line(&error.into()));
            Verified { layer: name, digest: None, diff_id: None, size_bytes: None, problem }
        }
        Ok(found) => {
            let same = digest.is_none_or(|digest| digest == found.digest)
                && diff_id.is_none_or(|diff_id| diff_id == found.diff_id);
            Verified {
                layer: name,
                digest: Some(found.digest.to_string()),
                diff_id: Some(found.diff_id.to_string()),
                size_bytes: Some(found.size),
                problem: (!same).then(|| "its digest or diff ID is another than the image says".to_owned()),
            }
        }
    }
}

fn tell(context: &Context, layers: &[Verified]) -> anyhow::Result<()> {
    if context.json {
        return output::json(&layers);
    }
    let row = |layer: &Verified| {
        let size = layer.size_bytes.map_or_else(|| "-".to_owned(), output::bytes);
        let diff_id = layer.diff_id.clone().unwrap_or_else(|| "-".to_owned());
        let state = layer.problem.clone().unwrap_or_else(|| "good".to_owned());
        vec![layer.layer.clone(), size, diff_id, state]
    };
    output::print_line(&output::table(&["LAYER", "SIZE", "DIFF ID", "STATE"], layers.iter().map(row)))
}
