//! buildah with a storage of its own, beneath one folder.
//!
//! Invariant: nothing of it is left mounted, and nothing is outside the folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use vmctr_tests::rig::command::{self, Output};

use super::used::Used;

/// The storage.
pub struct Buildah {
    folder: PathBuf,
}

/// A container whose root is mounted.
pub struct Working {
    id: String,
    /// Where its root is.
    pub root: PathBuf,
}

impl Buildah {
    /// An empty storage in a new folder.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// A container of an image, or of `scratch`.
    pub fn from(&self, image: &str) -> Working {
        let id = self.run(&["from", "--pull-never", image]).ok().text().trim().to_owned();
        let root = PathBuf::from(self.run(&["mount", &id]).ok().text().trim());
        Working { id, root }
    }

    /// Commits, as gzip where the place is outside the storage.
    pub fn commit(&self, container: &Working, place: &str) -> Used {
        let args = ["commit", "--quiet", "--disable-compression=false", &container.id, place];
        Used::by(&mut self.command(&args))
    }

    /// Makes an image of a folder, the first of the storage or after all others; tells where its layer lies.
    pub fn image(&self, root: &Path, name: &str) -> PathBuf {
        let before = self.layers();
        let scratch = self.from("scratch");
        command::run(Command::new("cp").arg("-a").arg(root.join(".")).arg(&scratch.root)).ok();
        self.commit(&scratch, name);
        self.remove(&scratch);
        let new = self.layers().into_iter().find(|layer| !before.contains(layer));
        new.expect("an image has a layer")
    }

    /// Where the layers of images and containers lie.
    fn layers(&self) -> Vec<PathBuf> {
        let folders = fs::read_dir(self.folder.join("root/overlay")).into_iter().flatten().flatten();
        folders.map(|folder| folder.path().join("diff")).filter(|layer| layer.is_dir()).collect()
    }

    /// Removes a container.
    pub fn remove(&self, container: &Working) {
        self.run(&["rm", &container.id]).ok();
    }

    fn run(&self, args: &[&str]) -> Output {
        command::run(&mut self.command(args))
    }

    fn command(&self, args: &[&str]) -> Command {
        let at = |name: &str| self.folder.join(name);
        let mut buildah = Command::new("buildah");
        buildah.arg("--root").arg(at("root")).arg("--runroot").arg(at("run"));
        buildah.args(["--storage-driver", "overlay"]);
        buildah.args(args);
        buildah
    }
}

impl Drop for Buildah {
    fn drop(&mut self) {
        self.run(&["rm", "--all"]);
        // The storage keeps its folder mounted on itself.
        let _ = umount2(&self.folder.join("root/overlay"), MntFlags::MNT_DETACH);
    }
}

/// Size of the newest layer of the only image in an OCI folder.
pub fn layer_size(layout: &Path) -> u64 {
    let read = |path: PathBuf| -> Value {
        let text = fs::read(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
        serde_json::from_slice(&text).expect("JSON")
    };
    let index = read(layout.join("index.json"));
    let digest = index["manifests"][0]["digest"].as_str().expect("a digest").replace(':', "/");
    let manifest = read(layout.join("blobs").join(digest));
    let layers = manifest["layers"].as_array().expect("layers");
    layers.last().and_then(|layer| layer["size"].as_u64()).expect("a size")
}
