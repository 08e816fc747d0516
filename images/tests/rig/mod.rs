//! What the tests share: real overlays in a mount namespace of the test's own, and random operations.
//!
//! The product mounts no overlay; the kernel's is the judge here of what an upper folder means.

#![allow(dead_code)] // each test program uses a part of it

pub mod ops;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use vmctr_images::layer::{LayerInfo, LayerOptions, LayerReader, LayerWriter};
use vmctr_images::path::TreePath;
use vmctr_images::tree::{Difference, Form, How, Tree, apply, compare};
use vmctr_images::upper::{Consistency, Layers, Namespace, Note, Scope, Walk};

pub const LIMIT: u64 = 1 << 32;

/// Gives this thread mounts of its own, which end with it.
pub fn private_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
}

/// A mounted overlay; unmounted at the end.
pub struct Overlay {
    pub merged: PathBuf,
    pub upper: PathBuf,
}

impl Overlay {
    /// Mounts `lowers`, topmost first, under a new upper in `dir`.
    pub fn mount(dir: &Path, lowers: &[PathBuf], options: &str) -> Self {
        let [upper, work, merged] = ["upper", "work", "merged"].map(|name| dir.join(name));
        for path in [&upper, &work, &merged] {
            std::fs::create_dir_all(path).unwrap();
        }
        let lowers: Vec<_> = lowers.iter().map(|path| path.to_str().unwrap()).collect();
        let (lowers, up, work) = (lowers.join(":"), upper.display(), work.display());
        let data = format!("lowerdir={lowers},upperdir={up},workdir={work},{options}");
        mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(data.as_str()))
            .unwrap_or_else(|error| panic!("{data}: {error}"));
        Self { merged, upper }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        umount2(&self.merged, MntFlags::MNT_DETACH).unwrap();
    }
}

/// The folders of an overlay for a walk.
pub fn layers(folders: &[PathBuf]) -> Layers {
    Layers::open(folders, Namespace::Trusted).unwrap()
}

pub fn walk(layers: &Layers, scope: Scope) -> Walk<'_> {
    Walk::new(layers, scope, Consistency::Frozen, TreePath::root()).unwrap()
}

/// All that folders show, for a comparison. The kernel's overlay tidies up its own attributes while it
/// is read, so its folders' change times move.
pub fn tree(layers: &Layers) -> Tree<'_> {
    let walk = Walk::new(layers, Scope::Everything, Consistency::Live, TreePath::root()).unwrap();
    Tree::Folders(Box::new(walk))
}

/// Writes a layer to `file`.
pub fn write_layer(
    folders: &[PathBuf],
    scope: Scope,
    options: LayerOptions,
    file: &Path,
) -> Result<LayerInfo, Box<dyn std::error::Error>> {
    let layers = layers(folders);
    let mut walk = Walk::new(&layers, scope, Consistency::Frozen, TreePath::root())?;
    let mut writer = LayerWriter::new(File::create(file)?, options)?;
    while let Some(change) = walk.next_change()? {
        writer.add(&change, &mut |_| {})?;
    }
    Ok(writer.finish()?.1)
}

/// Applies a layer to a plain folder and checks that its digests are those that were announced.
pub fn apply_layer(file: &Path, info: &LayerInfo, root: &Path) {
    let reader = LayerReader::new(File::open(file).unwrap(), LIMIT).unwrap();
    let checked = apply(reader, root, Form::Plain).unwrap();
    assert_eq!((checked.digest, checked.size), (info.digest, info.size));
    assert_eq!((checked.diff_id, checked.bytes), (info.diff_id, info.totals.bytes));
}

/// How the folder `is` differs from the folder `should`, both as they are.
pub fn differences(is: &Path, should: &Path) -> Vec<Difference> {
    let (is, should) = (layers(&[is.to_owned()]), layers(&[should.to_owned()]));
    compare(tree(&is), tree(&should), 100).unwrap()
}

/// Without what was noted: hard links that a renamed folder shared with files that stayed.
pub fn without_split_links(mut differences: Vec<Difference>, notes: &[Note]) -> Vec<Difference> {
    let split: Vec<String> = notes
        .iter()
        .filter_map(|note| if let Note::SplitLink(path) = note { Some(path.to_string()) } else { None })
        .collect();
    let linked_to = |kind: &str| kind.strip_prefix("a hard link to ").unwrap_or_default().to_owned();
    differences.retain(|difference| match &difference.how {
        How::Kind(is, should) => {
            let names = [difference.path.to_string(), linked_to(is), linked_to(should)];
            !names.iter().any(|name| split.contains(name))
        }
        _ => true,
    });
    differences
}

/// What is noted of the changes.
pub fn notes(folders: &[PathBuf]) -> Vec<Note> {
    let layers = layers(folders);
    let mut walk = walk(&layers, Scope::Changes);
    while walk.next_change().unwrap().is_some() {}
    walk.notes().kept.clone()
}

pub fn show(differences: &[Difference]) -> String {
    differences.iter().map(|difference| format!("  {difference}\n")).collect()
}

/// A stream for a comparison.
pub fn stream(file: &Path) -> Tree<'static> {
    let source: Box<dyn Read> = Box::new(File::open(file).unwrap());
    Tree::Stream(Box::new(LayerReader::new(source, LIMIT).unwrap()))
}

pub fn folder(dir: &TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}
