//! `vmctr commit CONTAINER [REF]`: a container's changes as an image, a new folder, or both.
//!
//! ```text
//!   source (frozen) ─┬─ no folder wanted ──────────────────> layer ─> image      thawed at the end
//!                    └─ --to-dir, --pause=false: copied to a folder, thawed, ─> layer ─> image
//! ```
//!
//! Invariant: the container runs on, whatever happens: the shim lets it go when this process ends.

mod making;
mod report;

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use tempfile::TempDir;
use tokio::task::spawn_blocking;
use vmctr_images::commit::{Changes, capture};
use vmctr_images::config::{Base, Build};
use vmctr_images::layer::LayerOptions;
use vmctr_images::path::TreePath;
use vmctr_images::root::{RootPlan, Upper};
use vmctr_images::store::containerd::Store;
use vmctr_images::upper::{Consistency, Layers, Namespace, Scope};

use super::Context;
use super::diff::one_folder;
use crate::cli::{CommitArgs, ImageStore};
use crate::failure::{Failure, Outcome, Verdict};
use crate::source::Source;
use making::Making;
use report::Report;

/// Commits.
pub async fn run(context: &Context, args: CommitArgs) -> Outcome {
    let order = Order::of(args)?;
    let client = context.containerd().await?;
    let store = Store::reader(context.containerd().await?, &context.namespace);
    let mut source = Source::open(context, &client, &order.container, order.pause).await?;
    check_root(&source, &order)?;
    let base = base(&store, &source, &order).await?;
    let mut report = Report::default();
    let staged = stage(&mut source, &order, &mut report).await?;
    if staged.is_some() {
        release(&mut source, &mut report)?;
    }
    if let Some(image) = &order.image {
        let files = files(&source, staged.as_ref(), &order);
        let layers = Layers::open(&files, Namespace::Trusted)?;
        let making = Making { layers, base, order: &order };
        let made = match image {
            Image::Containerd(name) => {
                let snapshotter = Some(source.container.snapshotter.clone()).filter(|name| !name.is_empty());
                making.in_containerd(context, client, name, snapshotter).await?
            }
            Image::Files(files, tag) => making.in_files(store, files.clone(), tag.clone()).await?,
        };
        report.committed(&made);
    }
    release(&mut source, &mut report)?;
    report.print(context.json, order.quiet)?;
    Ok(Verdict::Good)
}

/// What the command line asks for, checked.
struct Order {
    container: String,
    pause: bool,
    quiet: bool,
    scope: Scope,
    subtree: TreePath,
    layer: LayerOptions,
    build: Build,
    to_dir: Option<PathBuf>,
    /// Where the image goes, and its name.
    image: Option<Image>,
}

/// An image to be made.
enum Image {
    /// Under this name in containerd.
    Containerd(String),
    /// In files, under this name if any.
    Files(Files, Option<String>),
}

#[derive(Clone)]
enum Files {
    Layout(PathBuf),
    Archive(PathBuf),
}

impl Order {
    fn of(args: CommitArgs) -> Result<Self, Failure> {
        let image = image(args.output, args.reference, args.to_dir.is_some())?;
        if args.squash && !args.pause {
            return Err(Failure::failed(anyhow!("--squash reads the whole image: it needs the pause")));
        }
        let subtree = args.subtree.unwrap_or_default();
        let subtree = TreePath::parse(subtree.as_bytes())
            .with_context(|| format!("--subtree {} is no path in the container", subtree.display()))?;
        Ok(Self {
            container: args.container,
            pause: args.pause,
            quiet: args.quiet,
            scope: if args.squash { Scope::Everything } else { Scope::Changes },
            subtree,
            layer: LayerOptions {
                compression: args.compression,
                clamp: args.timestamp,
                ..LayerOptions::default()
            },
            build: Build {
                instructions: args.changes,
                author: args.author,
                message: args.message,
                created: args.timestamp.unwrap_or_else(now),
                format: args.format,
                squash: args.squash,
            },
            to_dir: args.to_dir,
            image,
        })
    }
}

fn image(output: ImageStore, reference: Option<String>, folder: bool) -> Result<Option<Image>, Failure> {
    match (output, reference) {
        (ImageStore::Containerd, Some(name)) if name.trim().is_empty() => {
            Err(Failure::failed(anyhow!("The image's name is empty")))
        }
        (ImageStore::Containerd, Some(name)) => Ok(Some(Image::Containerd(name))),
        (ImageStore::Containerd, None) if folder => Ok(None),
        (ImageStore::Containerd, None) => Err(Failure::failed(anyhow!("The new image needs a name"))
            .hint("vmctr commit CONTAINER REF, or --to-dir DIR for a folder only")),
        (ImageStore::Layout { dir, tag }, reference) => {
            Ok(Some(Image::Files(Files::Layout(dir), tag.or(reference))))
        }
        (ImageStore::Archive(file), reference) => Ok(Some(Image::Files(Files::Archive(file), reference))),
    }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Fails when the root keeps no changes apart, or cannot have any.
fn check_root(source: &Source, order: &Order) -> Result<(), Failure> {
    let id = &source.container.id;
    match &source.container.root {
        _ if order.scope == Scope::Everything => Ok(()),
        RootPlan::Union { upper: Upper::None, .. } => {
            Err(Failure::failed(anyhow!("The root of container {id} is read-only: it cannot have changes")))
        }
        RootPlan::Folder { .. } => Err(one_folder(id)),
        RootPlan::Union { .. } => Ok(()),
    }
}

/// The image that the container was started from.
async fn base(store: &Store, source: &Source, order: &Order) -> Result<Base, Failure> {
    let name = &source.container.image;
    let stored = if name.is_empty() { None } else { store.image(name).await? };
    match (stored, &order.image) {
        (Some(stored), _) => Ok(stored.base),
        (None, Some(Image::Containerd(_))) if order.scope == Scope::Changes => Err(no_base(source)),
        (None, _) => {
            if order.image.is_some() && order.scope == Scope::Changes {
                eprintln!("vmctr: warning: {}; the new image has the new layer only", gone(name));
            }
            Ok(Base::empty())
        }
    }
}

fn gone(name: &str) -> String {
    if name.is_empty() {
        "The container was not started from an image".to_owned()
    } else {
        format!("Image {name}, which the container was started from, is not in containerd any more")
    }
}

fn no_base(source: &Source) -> Failure {
    Failure::failed(anyhow!("{}: there is nothing to put a layer on", gone(&source.container.image))).hint(
        "--squash makes an image of everything; --to-dir and --output oci-archive:FILE keep the changes",
    )
}

/// The changes, copied to a folder.
struct Staged {
    dir: PathBuf,
    _temporary: Option<TempDir>,
}

/// Copies the changes when a folder is wanted, or when they may change while they are read.
async fn stage(source: &mut Source, order: &Order, report: &mut Report) -> Result<Option<Staged>, Failure> {
    let staged = match &order.to_dir {
        Some(dir) => Staged { dir: std::path::absolute(dir)?, _temporary: None },
        None if source.consistency == Consistency::Live => temporary()?,
        None => return Ok(None),
    };
    let (layers, consistency) = (source.layers()?, source.consistency);
    let (scope, subtree, dir) = (source.scope, order.subtree.clone(), staged.dir.clone());
    let copied = spawn_blocking(move || {
        let changes = Changes { layers: &layers, scope, subtree: &subtree };
        capture(&changes, consistency, Namespace::Trusted, &dir)
    });
    let (folder, notes) = copied.await.context("copying was interrupted")??;
    report.notes(&notes);
    report.changed(&folder.changed);
    if order.to_dir.is_some() {
        report.folder(&staged.dir, folder.entries);
    }
    Ok(Some(staged))
}

fn temporary() -> Result<Staged, Failure> {
    let temporary = tempfile::Builder::new().prefix("vmctr-commit-").tempdir_in("/var/tmp");
    let temporary = temporary.context("cannot make a folder in /var/tmp")?;
    Ok(Staged { dir: temporary.path().join("changes"), _temporary: Some(temporary) })
}

/// Lets the container run on.
fn release(source: &mut Source, report: &mut Report) -> Result<(), Failure> {
    if let Some(since) = source.held_since.take() {
        report.pause = Some(since.elapsed());
    }
    source.release()
}

/// The folders that the layer is made from, topmost first.
fn files(source: &Source, staged: Option<&Staged>, order: &Order) -> Vec<PathBuf> {
    let mut folders = source.folders.clone();
    if let (Some(staged), Scope::Changes) = (staged, order.scope)
        && let Some(upper) = folders.first_mut()
    {
        upper.clone_from(&staged.dir);
    }
    folders
}
