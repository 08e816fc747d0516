//! Files to commit, the same in each run.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use vmctr_tests::rig::command::run;
use vmctr_tests::rig::prerequisites::debian_image;

const PER_FOLDER: u32 = 1000;

/// Small files and one large file of nothing but a hole, as a base that nobody reads.
pub fn fill_base(root: &Path, entries: u32, hole: u64) {
    for number in 0..entries {
        let folder = root.join("many").join((number / PER_FOLDER).to_string());
        if number % PER_FOLDER == 0 {
            fs::create_dir_all(&folder).expect("writable");
        }
        fs::write(folder.join(number.to_string()), "x").expect("writable");
    }
    let sparse = File::create(root.join("many/sparse")).expect("writable");
    sparse.set_len(hole).expect("a file may have holes");
}

/// The Debian root of the tests' image, several times: one is 100 MB, further than compressors look back.
pub fn debian(into: &Path, copies: usize) {
    let archive = into.with_extension("archive");
    fs::create_dir(&archive).expect("writable");
    run(Command::new("tar").arg("-xf").arg(debian_image()).arg("-C").arg(&archive)).ok();
    let blobs = fs::read_dir(archive.join("blobs/sha256")).expect("an image").flatten();
    let layer =
        blobs.max_by_key(|blob| blob.metadata().map_or(0, |meta| meta.len())).expect("it has a layer");
    for copy in 0..copies {
        let folder = into.join(format!("debian-{copy}"));
        fs::create_dir_all(&folder).expect("writable");
        run(Command::new("tar").arg("-xzf").arg(layer.path()).arg("-C").arg(&folder)).ok();
    }
    fs::remove_dir_all(&archive).expect("removable");
}

/// Text files of 100 to 1900 bytes, some thousand different words in no order.
pub fn small_files(into: &Path, count: u32) {
    const PER_SMALL_FOLDER: u32 = 100;
    let mut random = Random(1);
    for number in 0..count {
        let folder = into.join("small").join((number / PER_SMALL_FOLDER).to_string());
        if number % PER_SMALL_FOLDER == 0 {
            fs::create_dir_all(&folder).expect("writable");
        }
        let length = 100 + random.below(1800) as usize;
        let mut text = Vec::with_capacity(length + 16);
        while text.len() < length {
            let word = random.below(4000).wrapping_mul(2_654_435_761) % (1 << 20);
            write!(text, "w{word:x} ").expect("memory does not fail");
        }
        fs::write(folder.join(number.to_string()), text).expect("writable");
    }
}

/// Numbers that are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
