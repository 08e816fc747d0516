//! Applies a layer to a folder, without mounting anything.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::target::{Form, Make, Target, TreeError};
use crate::beneath::{self, Node};
use crate::layer::{Checked, Item, ItemKind, LayerReader, ReadError};
use crate::path::TreePath;

/// Zeros of this size become holes.
const STEP: usize = 64 * 1024;

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The folder cannot be opened.
    #[error("The folder to apply the layer to cannot be opened")]
    Root(#[source] io::Error),
    /// The layer is damaged.
    #[error("The layer cannot be applied")]
    Read(#[from] ReadError),
    /// The tree cannot be written.
    #[error("The layer cannot be applied")]
    Tree(#[from] TreeError),
}

/// Applies a layer to the folder `root`, and tells the layer's digests.
pub fn apply<R: Read>(mut layer: LayerReader<R>, root: &Path, form: Form) -> Result<Checked, ApplyError> {
    beneath::check_proc().map_err(ApplyError::Root)?;
    let root = Node::root(root).map_err(ApplyError::Root)?;
    let mut applied =
        Applied { target: Target::new(root, form), made: HashSet::new(), keys: RandomState::new() };
    while let Some(item) = layer.next_item()? {
        applied.item(&item, &mut layer)?;
    }
    applied.target.finish()?;
    Ok(layer.finish()?)
}

struct Applied {
    target: Target,
    /// Paths that this layer made, which its own opaque marks do not hide. Hashed with a secret key:
    /// whoever makes a layer cannot aim for collisions.
    made: HashSet<u64>,
    keys: RandomState,
}

impl Applied {
    fn item<R: Read>(&mut self, item: &Item, layer: &mut LayerReader<R>) -> Result<(), TreeError> {
        let Item { path, meta, xattrs, kind } = item;
        let mut fill = |file: &File| copy_content(layer, file);
        let make = match kind {
            ItemKind::Dir => Make::Dir,
            ItemKind::File(_) => Make::File(&mut fill),
            ItemKind::Symlink(target) => Make::Symlink(target),
            ItemKind::Char(device) => Make::Char(*device),
            ItemKind::Block(device) => Make::Block(*device),
            ItemKind::Fifo => Make::Fifo,
            ItemKind::Link(first) => {
                self.remember(path);
                return self.target.link(path, first);
            }
            ItemKind::Whiteout => return self.target.whiteout(path),
            ItemKind::Opaque => return self.opaque(path),
        };
        self.remember(path);
        self.target.make(path, meta, xattrs, make)
    }

    fn opaque(&mut self, path: &TreePath) -> Result<(), TreeError> {
        match self.target.form() {
            Form::Overlay(namespace) => self.target.opaque(path, namespace),
            // Without whiteouts, which a literal archive does not have, nobody is asked.
            Form::Literal => Ok(()),
            Form::Plain => {
                let (made, keys) = (&self.made, &self.keys);
                self.target.clear_dir(path, &|path| made.contains(&keys.hash_one(path)))
            }
        }
    }

    /// A path and the folders above it.
    fn remember(&mut self, path: &TreePath) {
        let mut path = Some(path.clone());
        while let Some(here) = path {
            if !self.made.insert(self.keys.hash_one(&here)) {
                break;
            }
            path = here.parent();
        }
    }
}

/// Writes what comes, leaving out zeros.
fn copy_content(content: &mut impl Read, file: &File) -> io::Result<()> {
    let mut buffer = vec![0; STEP];
    let mut position = 0;
    loop {
        let count = read_full(content, &mut buffer)?;
        let piece = &buffer[..count];
        if count == 0 {
            return file.set_len(position);
        }
        if piece.iter().any(|&byte| byte != 0) {
            file.write_all_at(piece, position)?;
        }
        position += count as u64;
    }
}

fn read_full(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}
