//! What is done in a union.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::tree::Tree;

/// What a turn costs: names that are not there, each asked for once, in a folder that was not listed.
pub const TURNS: &str = "one turn: stat of a name that is not there";

/// Microseconds in a second.
pub const MICRO: f64 = 1e6;

const BLOCK: usize = 1 << 20;
const PAGE: usize = 4096;

/// A workload.
pub struct Step {
    /// Its name.
    pub what: &'static str,
    /// Whether the name goes on with a count, of these.
    pub counted: bool,
    pub of: &'static str,
    /// Does it; tells how many.
    pub work: fn(&Path, &Tree) -> usize,
}

const fn step(what: &'static str, work: fn(&Path, &Tree) -> usize) -> Step {
    Step { what, counted: false, of: "", work }
}

const fn counted(what: &'static str, of: &'static str, work: fn(&Path, &Tree) -> usize) -> Step {
    Step { what, counted: true, of, work }
}

/// On the first mount.
pub const FINDING: &[Step] = &[
    step(TURNS, miss),
    step("find, cold", find),
    step("find, warm", find),
    step("read in order, cold", read_in_order),
    step("read in order, warm", read_in_order),
];

/// On the second.
pub const READING: &[Step] = &[
    step("tar, cold", tar),
    step("tar, warm", tar),
    step("read at random, cold", read_at_random),
    step("read at random, warm", read_at_random),
];

/// On one without an upper folder, where vmctr has the kernel read large files.
pub const READ_ONLY: &[Step] = &[
    step("read-only: read in order, cold", read_in_order),
    step("read-only: read in order, warm", read_in_order),
];

/// On the last.
pub const WRITING: &[Step] = &[
    step("write and fsync", write),
    counted("create", "small files", create),
    counted("rename", "files", rename),
    counted("copy up", "small files", copy_up),
    step("copy up the large file", copy_up_large),
    step("remove the tree", remove),
];

fn find(root: &Path, _: &Tree) -> usize {
    let mut find = Command::new("find");
    let status = find.args([".", "-printf", "%s %m\n"]).current_dir(root).stdout(Stdio::null()).status();
    assert!(status.expect("find is installed").success());
    1
}

/// Through a pipe: tar reads no contents when it writes to /dev/null.
fn tar(root: &Path, _: &Tree) -> usize {
    let mut tar = Command::new("tar");
    tar.args(["cf", "-", "--exclude=./large", "."]).current_dir(root).stdout(Stdio::piped());
    let mut tar = tar.spawn().expect("tar is installed");
    let (mut output, mut buffer) = (tar.stdout.take().expect("piped"), vec![0; BLOCK]);
    while output.read(&mut buffer).expect("readable") > 0 {}
    assert!(tar.wait().expect("ours").success());
    1
}

fn read_in_order(root: &Path, _: &Tree) -> usize {
    let (mut file, mut buffer) = (File::open(root.join("large")).expect("there"), vec![0; BLOCK]);
    while file.read(&mut buffer).expect("readable") > 0 {}
    1
}

fn read_at_random(root: &Path, tree: &Tree) -> usize {
    let file = File::open(root.join("large")).expect("there");
    let pages = file.metadata().expect("there").len() / PAGE as u64;
    let (mut at, mut buffer) = (1u64, vec![0; PAGE]);
    let count = tree.scaled(4000);
    for _ in 0..count {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        file.read_exact_at(&mut buffer, (at >> 33) % pages * PAGE as u64).expect("readable");
    }
    count
}

fn miss(root: &Path, tree: &Tree) -> usize {
    let count = tree.scaled(1000);
    for number in 0..count {
        assert!(fs::symlink_metadata(root.join(format!("none{number}"))).is_err());
    }
    count
}

fn write(root: &Path, tree: &Tree) -> usize {
    let (mut file, block) = (File::create(root.join("written")).expect("writable"), vec![7; BLOCK]);
    for _ in 0..tree.scaled(512) {
        file.write_all(&block).expect("writable");
    }
    file.sync_all().expect("written");
    1
}

fn create(root: &Path, tree: &Tree) -> usize {
    let folder = root.join("new");
    fs::create_dir(&folder).expect("writable");
    let count = tree.scaled(1000);
    for number in 0..count {
        fs::write(folder.join(number.to_string()), vec![b'x'; PAGE]).expect("writable");
    }
    count
}

fn rename(root: &Path, tree: &Tree) -> usize {
    let (folder, count) = (root.join("new"), tree.scaled(1000));
    for number in 0..count {
        fs::rename(folder.join(number.to_string()), folder.join(format!("r{number}"))).expect("writable");
    }
    count
}

fn copy_up(root: &Path, tree: &Tree) -> usize {
    let files = tree.some(tree.scaled(500));
    for file in &files {
        let mut file = File::options().append(true).open(root.join(file)).expect("writable");
        file.write_all(b"more").expect("writable");
    }
    files.len()
}

fn copy_up_large(root: &Path, _: &Tree) -> usize {
    let mut file = File::options().append(true).open(root.join("large")).expect("writable");
    file.write_all(b"more").expect("writable");
    1
}

fn remove(root: &Path, _: &Tree) -> usize {
    for number in 0..10 {
        fs::remove_dir_all(root.join(number.to_string())).expect("writable");
    }
    1
}
