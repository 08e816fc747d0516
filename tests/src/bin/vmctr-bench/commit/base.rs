//! A small change on a large base: what a commit costs must not depend on the base.
//!
//! ```text
//! image: busybox, imported by both ── its one unpacked layer, in both stores ── filled with the same entries
//! ```
//!
//! The entries are put into the unpacked layers, as an archive would carry the holes as zeros. Neither side reads
//! them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmctr_tests::rig::command::run;
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::image;

use super::super::bench::{BUILDAH, Bench, idle, progress};
use super::super::results::Unit::Seconds;
use super::buildah::{Buildah, Working};
use super::content::fill_base;
use super::used::Used;
use super::{NAME, relative, report_of, vmctr};

const GIB: u64 = 1 << 30;

/// Name, entries, bytes of the hole.
const BASES: [(&str, u32, u64); 2] =
    [("two files on 10000", 10_000, 0), ("two files on 200000, 10 GiB sparse", 200_000, 10 * GIB)];

const CHANGE: &str = "echo a > /two-a; echo b > /etc/two-b";
const NEW: &str = "bench.test/new:1";

struct Pair<'rig> {
    what: &'static str,
    ours: Container<'rig>,
    theirs: Working,
}

pub fn measure(bench: &mut Bench, buildah: &Buildah) {
    let bases = bench.sizes(&BASES);
    let pairs: Vec<_> =
        bases.iter().enumerate().map(|(number, base)| pair(bench, buildah, number, *base)).collect();
    for _ in 0..bench.repeats(9) {
        let start = Used::by(bench.rig.vmctr_command().arg("--version"));
        bench.add(NAME, "start of the program", vmctr(), Seconds, start.seconds);
        pairs.iter().for_each(|pair| one(bench, buildah, pair));
    }
    for pair in pairs {
        buildah.remove(&pair.theirs);
        pair.ours.remove();
    }
}

/// The same base in both stores, and a container on each.
fn pair<'rig>(
    bench: &mut Bench<'rig>,
    buildah: &Buildah,
    number: usize,
    (what, entries, hole): (&'static str, u32, u64),
) -> Pair<'rig> {
    progress(NAME, what);
    let name = format!("bench.test/base:{number}");
    let root = bench.rig.new_folder(&format!("commit-base-{number}"));
    image::write_root(&root, &[]);
    // So that the layers differ.
    fs::write(root.join("base"), &name).expect("writable");
    let archive = root.with_extension("tar");
    image::write_archive(&root, &name, &archive);
    bench.rig.import(&archive);
    fill_base(&unpacked(bench, &name), entries, hole);
    fill_base(&buildah.image(&root, &name), entries, hole);
    let (ours, theirs) = (idle(bench.container_of(vmctr(), &name)), buildah.from(&name));
    ours.sh(CHANGE).ok();
    run(Command::new("sh").args(["-c", &relative(CHANGE)]).current_dir(&theirs.root)).ok();
    Pair { what, ours, theirs }
}

/// Where containerd has the only layer of an image.
fn unpacked(bench: &mut Bench, image: &str) -> PathBuf {
    let container = bench.container_of(vmctr(), image);
    container.create().ok();
    let mounts = bench.rig.ctr_run(&["snapshots", "mounts", "/nowhere", container.id()]).ok().text();
    bench.rig.existing(container.id()).forget();
    let option = mounts.split([',', ' ', '\n']).find_map(|option| option.strip_prefix("lowerdir="));
    Path::new(option.unwrap_or_else(|| panic!("no overlay: {mounts}"))).to_owned()
}

fn one(bench: &mut Bench, buildah: &Buildah, Pair { what, ours, theirs }: &Pair) {
    let used = Used::by(bench.rig.vmctr_command().args(["--json", "commit", ours.id(), NEW]));
    bench.add(NAME, *what, vmctr(), Seconds, used.seconds);
    let pause = report_of(&used)["pause_micros"].as_u64().expect("it ran");
    bench.add(NAME, format!("{what}: pause"), vmctr(), Seconds, pause as f64 / 1e6);
    bench.add(NAME, *what, &BUILDAH, Seconds, buildah.commit(theirs, NEW).seconds);
}
