//! Commits of running containers, and `buildah commit` of the same changes on the same base.
//!
//! ```text
//! base     two files on small and large bases, to the store that each runs images from
//! layers   large and many changes, to a new OCI folder, which both compress for
//!   └─ content (what is committed)   used (time, processors, memory)   buildah (with a storage of its own)
//! ```

mod base;
mod buildah;
mod content;
mod layers;
mod used;

use serde_json::Value;

use super::bench::{Bench, SUBJECTS, Subject};
use buildah::Buildah;
use used::Used;

const NAME: &str = "commit";

pub fn measure(bench: &mut Bench) {
    let buildah = Buildah::new(bench.rig.new_folder("buildah"));
    base::measure(bench, &buildah);
    layers::measure(bench, &buildah);
}

fn vmctr() -> &'static Subject {
    SUBJECTS.iter().find(|subject| subject.has_vm()).expect("vmctr is measured")
}

fn report_of(used: &Used) -> Value {
    serde_json::from_slice(&used.stdout).expect("vmctr prints JSON")
}

/// The script with its paths below the working directory.
fn relative(script: &str) -> String {
    script.replace(" /", " ./")
}
