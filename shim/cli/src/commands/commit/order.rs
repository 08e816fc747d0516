//! What the command line asks for, checked before anything stands still.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use vmctr_images::config::Build;
use vmctr_images::layer::LayerOptions;
use vmctr_images::path::TreePath;
use vmctr_images::root::{RootPlan, Upper};
use vmctr_images::upper::Scope;

use crate::cli::{CommitArgs, ImageStore};
use crate::commands::diff::one_folder;
use crate::container::Container;
use crate::failure::Failure;

/// A commit to be made.
pub struct Order {
    pub container: String,
    pub pause: bool,
    pub quiet: bool,
    pub verify: bool,
    pub scope: Scope,
    pub subtree: TreePath,
    pub layer: LayerOptions,
    pub build: Build,
    pub to_dir: Option<PathBuf>,
    /// Where the image goes, and its name.
    pub image: Option<Image>,
}

/// An image to be made.
pub enum Image {
    /// Under this name in containerd.
    Containerd(String),
    /// In files, under this name if any.
    Files(Files, Option<String>),
}

/// Where to.
#[derive(Clone)]
pub enum Files {
    /// A folder.
    Layout(PathBuf),
    /// A file.
    Archive(PathBuf),
}

impl Order {
    /// Checks the arguments.
    pub fn of(args: CommitArgs) -> Result<Self, Failure> {
        let image = image(args.output, args.reference, args.to_dir.is_some())?;
        if args.squash && !args.pause {
            return Err(Failure::failed(anyhow!("--squash reads the whole image: it needs the pause")));
        }
        if args.verify && !args.pause {
            return Err(Failure::failed(anyhow!(
                "--verify compares with what stands still: it needs the pause"
            )));
        }
        let subtree = args.subtree.unwrap_or_default();
        let subtree = TreePath::parse(subtree.as_bytes())
            .with_context(|| format!("--subtree {} is no path in the container", subtree.display()))?;
        Ok(Self {
            container: args.container,
            pause: args.pause,
            quiet: args.quiet,
            verify: args.verify,
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
        (ImageStore::Containerd, Some(name)) if name.contains(|c: char| c == '@' || c.is_whitespace()) => {
            let why = "the image's digest is not known before it is made, and names have no spaces";
            Err(Failure::failed(anyhow!("{name:?} cannot be the new image's name: {why}"))
                .hint("name it such as docker.io/library/mine:1"))
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
pub fn check_root(container: &Container, order: &Order) -> Result<(), Failure> {
    let id = &container.id;
    match &container.root {
        _ if order.scope == Scope::Everything => Ok(()),
        RootPlan::Union { upper: Upper::None, .. } => {
            Err(Failure::failed(anyhow!("The root of container {id} is read-only: it cannot have changes")))
        }
        RootPlan::Folder { .. } => Err(one_folder(id)),
        RootPlan::Union { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_in_containerd_has_a_name_that_tools_can_read() {
        for name in ["", " ", "a b", "mine:1\n", "docker.io/library/mine@sha256:00"] {
            assert!(image(ImageStore::Containerd, Some(name.to_owned()), false).is_err(), "{name}");
        }
        let named = image(ImageStore::Containerd, Some("localhost:5000/mine:1".to_owned()), false);
        assert!(matches!(named, Ok(Some(Image::Containerd(name))) if name == "localhost:5000/mine:1"));
    }
}
