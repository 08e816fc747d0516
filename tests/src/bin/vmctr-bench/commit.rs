//! Commits of running containers, and `buildah commit` of the same changes on the same base.
//!
//! Two files on a base of many entries go to the store that each runs images from; the larger changes go to a new OCI
//! folder, which both compress for.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use vmctr_tests::rig::command::run;
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::image;

use super::bench::{BUILDAH, Bench, SUBJECTS, Subject, idle, progress};
use super::buildah::{Buildah, Working, layer_size};
use super::results::Unit::{Mib, Seconds};

const NAME: &str = "commit";
const BASE: &str = "bench.test/base:1";
const NEW: &str = "bench.test/new:1";
const ENTRIES: u32 = 10_000;

/// What a container does, by its own shell.
struct Change {
    name: &'static str,
    script: &'static str,
    /// To a folder, so compressed; else to the store.
    compressions: &'static [&'static str],
}

const CHANGES: [Change; 3] = [
    Change { name: "two files on 10000", script: "echo a > /two-a; echo b > /etc/two-b", compressions: &[] },
    Change {
        name: "256 MiB random",
        script: "rm -rf /two-a /etc/two-b; dd if=/dev/urandom of=/random bs=1M count=256 2>/dev/null",
        compressions: &["zstd", "gzip"],
    },
    Change {
        name: "2000 small files",
        script: "rm /random; mkdir /small; for i in $(seq 2000); do echo $i > /small/$i; done",
        compressions: &["zstd", "gzip"],
    },
];

pub fn measure(bench: &mut Bench) {
    let root = bench.rig.new_folder("commit-base");
    image::write_root(&root, &[]);
    let many = root.join("many");
    fs::create_dir(&many).expect("writable");
    (0..ENTRIES).for_each(|number| fs::write(many.join(number.to_string()), "x").expect("writable"));
    let archive = bench.rig.folder().join("commit-base.tar");
    image::write_archive(&root, BASE, &archive);
    bench.rig.import(&archive);
    let vmctr = SUBJECTS.iter().find(|subject| subject.has_vm()).expect("vmctr is measured");
    let container = idle(bench.container_of(vmctr, BASE));
    let buildah = Buildah::new(bench.rig.new_folder("buildah"));
    let scratch = buildah.from("scratch");
    copy(&root, &scratch.root);
    buildah.commit(&scratch, BASE);
    buildah.remove(&scratch);
    let theirs = buildah.from(BASE);
    for change in &CHANGES {
        progress(NAME, change.name);
        container.sh(change.script).ok();
        // In its root, by relative paths.
        run(Command::new("sh").args(["-c", &relative(change.script)]).current_dir(&theirs.root)).code();
        for turn in 0..bench.repeats(5) {
            one(bench, change, (vmctr, &container), (&buildah, &theirs), turn);
        }
    }
    buildah.remove(&theirs);
    container.remove();
}

/// The script with its paths below the working directory; its devices are the host's.
fn relative(script: &str) -> String {
    script.replace(" /", " ./").replace("of=/", "of=./").replace("./dev/", "/dev/")
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from.join(".")).arg(to)).ok();
}

fn one(
    bench: &mut Bench,
    change: &Change,
    (vmctr, container): (&'static Subject, &Container<'_>),
    (buildah, theirs): (&Buildah, &Working),
    turn: usize,
) {
    let folder = bench.rig.new_folder(&format!("commit-{}-{turn}", change.name.replace(' ', "-")));
    if change.compressions.is_empty() {
        ours(bench, vmctr, change.name, &[container.id(), NEW]);
        let begun = Instant::now();
        buildah.commit(theirs, NEW);
        bench.add(NAME, change.name, &BUILDAH, Seconds, begun.elapsed().as_secs_f64());
    }
    for compression in change.compressions {
        let layout = format!("oci:{}", folder.join(compression).display());
        let what = format!("{}, {compression}", change.name);
        ours(bench, vmctr, &what, &["--compression", compression, "--output", &layout, container.id()]);
    }
    if !change.compressions.is_empty() {
        let layout = folder.join("theirs");
        let begun = Instant::now();
        buildah.commit(theirs, &format!("oci:{}", layout.display()));
        let what = format!("{}, gzip", change.name);
        bench.add(NAME, what.clone(), &BUILDAH, Seconds, begun.elapsed().as_secs_f64());
        bench.add(NAME, format!("{what}: size"), &BUILDAH, Mib, mib(layer_size(&layout)));
    }
    fs::remove_dir_all(&folder).expect("removable");
}

fn ours(bench: &mut Bench, vmctr: &'static Subject, what: &str, args: &[&str]) {
    let mut command = bench.rig.vmctr_command();
    command.args(["--json", "commit"]).args(args);
    let begun = Instant::now();
    let report = run(&mut command).ok().json();
    bench.add(NAME, what, vmctr, Seconds, begun.elapsed().as_secs_f64());
    let number = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("no {key} in {report}"));
    bench.add(NAME, format!("{what}: pause"), vmctr, Seconds, number("pause_micros") as f64 / 1e6);
    bench.add(NAME, format!("{what}: size"), vmctr, Mib, mib(number("size_bytes")));
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
