//! buildah with a storage of its own, beneath one folder.
//!
//! Invariant: nothing of it is left mounted, and nothing is outside the folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use vmctr_tests::rig::command::{self, Output};

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
    pub fn commit(&self, container: &Working, place: &str) {
        self.run(&["commit", "--quiet", "--disable-compression=false", &container.id, place]).ok();
    }

    /// Removes a container.
    pub fn remove(&self, container: &Working) {
        self.run(&["rm", &container.id]).ok();
    }

    fn run(&self, args: &[&str]) -> Output {
        let at = |name: &str| self.folder.join(name);
        let mut buildah = Command::new("buildah");
        buildah.arg("--root").arg(at("root")).arg("--runroot").arg(at("run"));
        buildah.args(["--storage-driver", "overlay"]);
        command::run(buildah.args(args))
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
