//! Files of the image and files written to the container's root: under vmctr they pass the share and the guest's
//! overlay, under runc the host's overlay.
//!
//! *Cold* is a container that has just started, and a host that holds none of the files' bytes in its page cache.
//! *Warm* is the same once more, in the same container.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Advice, fadvise};
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::{Rig, command, image, stream};

use super::bench::{Bench, Subject, idle, progress};
use super::results::Unit::{self, MibPerSecond, Seconds};
use super::streams::timed;

const NAME: &str = "share";

const IMAGE: &str = "docker.io/vmctr/files:bench";

const LARGE_MIB: u64 = 128;
const SMALL_FILES: u64 = 2000;
const SMALL_BYTES: u64 = 4096;

/// `cat` would let the kernel move the pages, and a kernel that has them moves nothing.
const READ_LARGE: &str = "dd if=/data/large of=/dev/null bs=1M 2>/dev/null";
const READ_SMALL: &str = "cat /data/small/* > /dev/null";

pub fn measure(bench: &mut Bench) {
    progress(NAME, "making the image");
    import_files(bench.rig);
    let repeats = bench.repeats(5);
    bench.alternate(NAME, repeats, one);
}

fn one(bench: &mut Bench, subject: &'static Subject) {
    let container = idle(bench.container_of(subject, IMAGE));
    forget_pages(bench.rig);
    let small = format!("read {SMALL_FILES} files of {} KiB", SMALL_BYTES >> 10);
    let large = format!("read {LARGE_MIB} MiB");
    for (what, script, unit) in [(&small, READ_SMALL, Seconds), (&large, READ_LARGE, MibPerSecond)] {
        for cache in ["cold", "warm"] {
            add(bench, subject, &format!("{what}, {cache}"), &container, script, unit);
        }
    }
    let write = format!("dd if=/dev/zero of=/written bs=1M count={LARGE_MIB} conv=fsync 2>/dev/null");
    add(bench, subject, &format!("write {LARGE_MIB} MiB and fsync"), &container, &write, MibPerSecond);
    container.remove();
}

fn add(bench: &mut Bench, subject: &Subject, what: &str, container: &Container, script: &str, unit: Unit) {
    let took = timed(container, script).as_secs_f64();
    let sample = if unit == MibPerSecond { LARGE_MIB as f64 / took } else { took };
    bench.add(NAME, what, subject, unit, sample);
}

fn import_files(rig: &Rig) {
    let root = rig.busybox_root("files", &[]);
    let small = root.join("data/small");
    fs::create_dir_all(&small).expect("the rig's folder is writable");
    write_file(&root.join("data/large"), LARGE_MIB << 20, 0);
    for number in 1..=SMALL_FILES {
        write_file(&small.join(format!("{number:04}")), SMALL_BYTES, number);
    }
    let archive = rig.folder().join("files.tar");
    image::write_archive(&root, IMAGE, &archive);
    fs::remove_dir_all(root).expect("just written");
    rig.import(&archive);
    fs::remove_file(archive).expect("just written");
}

fn write_file(path: &Path, bytes: u64, seed: u64) {
    let mut file = File::create(path).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
    stream::send(&mut file, bytes, seed).expect("the rig's folder is writable");
}

/// Makes the host read the image's files from its disk again.
fn forget_pages(rig: &Rig) {
    command::run(&mut Command::new("sync")).ok();
    for path in image_files(rig) {
        let file = File::open(&path).unwrap_or_else(|e| panic!("cannot open {}: {e}", path.display()));
        fadvise(&file, 0, None, Advice::DontNeed).expect("a regular file");
    }
}

/// Wherever the snapshotter keeps them.
fn image_files(rig: &Rig) -> Vec<PathBuf> {
    let mut find = Command::new("find");
    find.arg(rig.daemon().root()).args(["-type", "f", "-path", "*/data/*"]);
    let files: Vec<_> = command::run(&mut find).ok().text().lines().map(PathBuf::from).collect();
    assert!(files.len() as u64 > SMALL_FILES, "the image's files are not there");
    files
}
