//! Many or large changes, to a new OCI folder: vmctr by both compressions, and buildah, which has gzip.
//!
//! ```text
//! content ─┬─ upper folder of a container in a VM ── vmctr commit
//!          └─ root of a container of buildah's ───── buildah commit
//! ```
//!
//! The host puts the content there, as an emulated guest would take minutes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmctr_tests::rig::command::run;
use vmctr_tests::rig::container::Container;

use super::super::bench::{BUILDAH, Bench, Subject, idle, progress};
use super::super::memory::shim;
use super::super::results::Unit::{Cores, Mib, Seconds};
use super::buildah::{Buildah, Working, layer_size};
use super::used::{Used, peak};
use super::{NAME, content, report_of, vmctr};

/// What is committed.
struct Content {
    name: &'static str,
    make: fn(&Path),
}

const CONTENTS: [Content; 3] = [
    Content { name: "256 MiB random", make: random },
    Content { name: "Debian root, 7 times", make: |into| content::debian(into, 7) },
    Content { name: "100000 small files", make: |into| content::small_files(into, 100_000) },
];

/// When all is to be quick.
const LESS: [Content; 2] = [
    Content { name: "Debian root", make: |into| content::debian(into, 1) },
    Content { name: "2000 small files", make: |into| content::small_files(into, 2000) },
];

/// How vmctr packs; `None` for times as they are, else as buildah has them, in whole seconds.
const WAYS: [(Subject, &str, Option<&str>); 3] = [
    (Subject::named("vmctr, zstd"), "zstd", None),
    (Subject::named("vmctr, gzip"), "gzip", None),
    (Subject::named("vmctr, gzip, one time"), "gzip", Some("1000000000")),
];

pub fn measure(bench: &mut Bench, buildah: &Buildah) {
    let contents: &[Content] = if bench.is_quick() { &LESS } else { &CONTENTS };
    for (number, content) in contents.iter().enumerate() {
        progress(NAME, content.name);
        let upper = bench.rig.new_folder(&format!("commit-upper-{number}"));
        (content.make)(&upper);
        let theirs = buildah.from("scratch");
        run(Command::new("cp").arg("-a").arg(upper.join(".")).arg(&theirs.root)).ok();
        let root = bench.rig.busybox_root(&format!("commit-root-{number}"), &[]);
        let run = bench.container_in(vmctr(), &root).annotation("io.vmctr.upper-dir", upper.display());
        let ours = idle(run);
        for turn in 0..bench.repeats(3) {
            let out = bench.rig.new_folder(&format!("commit-out-{number}-{turn}"));
            WAYS.iter().for_each(|way| pack(bench, content.name, way, &ours, &out));
            theirs_too(bench, content.name, buildah, &theirs, &out);
            fs::remove_dir_all(&out).expect("removable");
        }
        let shim = peak(shim(bench.rig, ours.id())).expect("it runs");
        bench.add(NAME, format!("{}: memory of the shim", content.name), vmctr(), Mib, mib(shim));
        buildah.remove(&theirs);
        ours.remove();
        fs::remove_dir_all(&upper).expect("removable");
    }
}

fn random(into: &Path) {
    let script = "head -c 268435456 /dev/urandom > random";
    run(Command::new("sh").args(["-c", script]).current_dir(into)).ok();
}

fn pack(
    bench: &mut Bench,
    name: &str,
    (subject, compression, time): &'static (Subject, &str, Option<&str>),
    container: &Container<'_>,
    out: &Path,
) {
    let layout = format!("oci:{}", out.join(subject.name.replace([',', ' '], "-")).display());
    let mut command = bench.rig.vmctr_command();
    command.args(["--json", "commit", "--compression", compression, "--output", &layout]);
    command.args(time.iter().flat_map(|time| ["--timestamp", time])).arg(container.id());
    let used = Used::by(&mut command);
    let report = report_of(&used);
    let number = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("no {key} in {report}"));
    add(bench, name, subject, &used, number("size_bytes"));
    bench.add(NAME, format!("{name}: pause"), subject, Seconds, number("pause_micros") as f64 / 1e6);
}

fn theirs_too(bench: &mut Bench, name: &str, buildah: &Buildah, container: &Working, out: &Path) {
    let layout: PathBuf = out.join("theirs");
    let used = buildah.commit(container, &format!("oci:{}", layout.display()));
    add(bench, name, &BUILDAH, &used, layer_size(&layout));
}

fn add(bench: &mut Bench, name: &str, subject: &Subject, used: &Used, size: u64) {
    bench.add(NAME, name, subject, Seconds, used.seconds);
    bench.add(NAME, format!("{name}: size"), subject, Mib, mib(size));
    bench.add(NAME, format!("{name}: memory"), subject, Mib, mib(used.peak));
    bench.add(NAME, format!("{name}: cores"), subject, Cores, used.cores);
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
