//! The folders that are united: the same lower layers for all, an upper folder for each mount.
//!
//! ```text
//!   base/0..9/0..9/   85 files each, 1 to 8 KiB        top/0/0..9/   50 files each
//!   base/large        512 MiB, in chunks that differ
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use vmctr_tests::rig::stream;

const FOLDERS: u32 = 10;
const BASE_FILES: usize = 93;
const TOP_FILES: usize = 50;
const LARGE: u64 = 512 << 20;

/// The folders, and what is in them.
pub struct Tree {
    place: PathBuf,
    files: Vec<PathBuf>,
    scale: usize,
}

impl Tree {
    /// Makes them; of everything `scale` times less.
    pub fn make(place: &Path, scale: usize) -> Self {
        let mut tree = Self { place: place.to_owned(), files: Vec::new(), scale };
        for (outer, inner) in (0..FOLDERS).flat_map(|outer| (0..FOLDERS).map(move |inner| (outer, inner))) {
            let folder = format!("{outer}/{inner}");
            tree.fill(&format!("base/{folder}"), "b", BASE_FILES / scale + 1);
            if outer == 0 {
                tree.fill(&format!("top/{folder}"), "t", TOP_FILES / scale + 1);
            }
        }
        tree.write("base/large", LARGE / scale as u64);
        tree
    }

    fn fill(&mut self, folder: &str, prefix: &str, count: usize) {
        fs::create_dir_all(self.place.join(folder)).expect("writable");
        for number in 0..count {
            self.write(&format!("{folder}/{prefix}{number}"), 1024 * (1 + number as u64 % 8));
        }
    }

    fn write(&mut self, name: &str, bytes: u64) {
        let path = self.place.join(name);
        let mut file = File::create(&path).unwrap_or_else(|e| panic!("cannot write {name}: {e}"));
        stream::send(&mut file, bytes, self.files.len() as u64).expect("writable");
        self.files.push(path);
    }

    /// The options of mount(8) that make a union of them, with an upper folder that nobody has used.
    pub fn options(&self) -> String {
        for folder in ["upper", "work", "mnt"] {
            let folder = self.place.join(folder);
            // What an overlay leaves in its work folder has no permissions, which root does not mind.
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir(&folder).expect("writable");
        }
        let at = |name| self.place.join(name).display().to_string();
        format!("{},upperdir={},workdir={}", self.lowers(), at("upper"), at("work"))
    }

    /// The options of a union that nothing can be changed in.
    pub fn lowers(&self) -> String {
        let at = |name| self.place.join(name).display().to_string();
        format!("lowerdir={}:{}", at("top"), at("base"))
    }

    /// Where they are united.
    pub fn mountpoint(&self) -> PathBuf {
        self.place.join("mnt")
    }

    /// So many, but fewer when all is smaller.
    pub fn scaled(&self, count: usize) -> usize {
        (count / self.scale).max(1)
    }

    /// Paths of small lower files below the union's root, spread over all folders.
    pub fn some(&self, count: usize) -> Vec<PathBuf> {
        let base = self.place.join("base");
        let small: Vec<_> = self.files.iter().filter_map(|file| file.strip_prefix(&base).ok()).collect();
        let small = &small[..small.len() - 1];
        small
            .iter()
            .step_by((small.len() / count).max(1))
            .take(count)
            .map(|file| file.to_path_buf())
            .collect()
    }

    /// Makes the host read the files from its disk again.
    pub fn forget_pages(&self) {
        rustix::fs::sync();
        for path in &self.files {
            let file = File::open(path).unwrap_or_else(|e| panic!("cannot open {}: {e}", path.display()));
            fadvise(&file, 0, None, Advice::DontNeed).expect("a regular file");
        }
    }

    /// Nothing of it is left.
    pub fn remove(self) {
        fs::remove_dir_all(&self.place).expect("ours");
    }
}
