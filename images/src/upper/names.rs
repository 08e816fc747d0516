//! The names in a folder, sorted, with bounded memory however many there are.
//!
//! Invariant: names come strictly ascending. A folder that fits the budget is read once; a larger one
//! is read again for each batch of the next smallest names, so memory stays bounded and time grows.

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::fs::RawDir;

use super::error::MAX_NAMES;
use crate::beneath::Node;

const BUFFER: usize = 32 * 1024;
/// What a name costs beside its bytes.
const OVERHEAD: usize = 48;

/// A cursor over one folder.
struct SortedNames {
    budget: usize,
    batch: std::collections::btree_set::IntoIter<Vec<u8>>,
    after: Option<Vec<u8>>,
    complete: bool,
    peeked: Option<Vec<u8>>,
}

impl SortedNames {
    /// Names of a folder `depth` levels down: deeper ones get less memory, so that the sum is bounded.
    fn new(depth: usize) -> Self {
        Self::with_budget(((8 << 20) >> (depth / 4).min(20)).max(16 * 1024))
    }

    fn with_budget(budget: usize) -> Self {
        Self { budget, batch: BTreeSet::new().into_iter(), after: None, complete: false, peeked: None }
    }

    /// The next name, without taking it.
    fn peek(&mut self, dir: &Node) -> io::Result<Option<&[u8]>> {
        if self.peeked.is_none() {
            self.peeked = self.batch.next();
        }
        if self.peeked.is_none() && !self.complete {
            self.fill(&dir.open_dir()?)?;
            self.peeked = self.batch.next();
        }
        Ok(self.peeked.as_deref())
    }

    /// Takes the peeked name if it is `name`.
    fn take_if(&mut self, name: &[u8]) {
        if self.peeked.as_deref() == Some(name) {
            self.after = self.peeked.take();
        }
    }

    fn fill(&mut self, dir: &OwnedFd) -> io::Result<()> {
        rustix::fs::seek(dir, rustix::fs::SeekFrom::Start(0))?;
        let mut batch = Smallest { names: BTreeSet::new(), bytes: 0, budget: self.budget, dropped: false };
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut entries = RawDir::new(dir, &mut buffer);
        let mut seen = 0;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            seen += 1;
            if seen > MAX_NAMES {
                return Err(io::Error::from(io::ErrorKind::FileTooLarge));
            }
            let wanted =
                name != b"." && name != b".." && self.after.as_deref().is_none_or(|after| name > after);
            if wanted {
                batch.add(name);
            }
        }
        self.complete = !batch.dropped;
        self.batch = batch.names.into_iter();
        Ok(())
    }
}

/// The smallest names that fit the budget; at least one.
struct Smallest {
    names: BTreeSet<Vec<u8>>,
    bytes: usize,
    budget: usize,
    dropped: bool,
}

impl Smallest {
    fn add(&mut self, name: &[u8]) {
        if self.dropped && self.names.last().is_some_and(|last| name >= last.as_slice()) {
            return;
        }
        if self.names.insert(name.to_vec()) {
            self.bytes += name.len() + OVERHEAD;
        }
        while self.bytes > self.budget && self.names.len() > 1 {
            let largest = self.names.pop_last().map_or(0, |name| name.len());
            self.bytes -= largest + OVERHEAD;
            self.dropped = true;
        }
    }
}

/// The names of a folder that consists of several, each once.
pub(super) struct MergedNames(Vec<SortedNames>);

impl MergedNames {
    pub(super) fn new(folders: usize, depth: usize) -> Self {
        Self((0..folders).map(|_| SortedNames::new(depth)).collect())
    }

    /// How many folders it looks at.
    pub(super) fn folders(&self) -> usize {
        self.0.len()
    }

    /// The next name in any of the folders, which are always the same.
    pub(super) fn next(&mut self, folders: &[Rc<Node>]) -> io::Result<Option<Vec<u8>>> {
        let mut least: Option<Vec<u8>> = None;
        for (names, folder) in self.0.iter_mut().zip(folders) {
            let name = names.peek(folder)?;
            if let Some(name) = name.filter(|name| least.as_deref().is_none_or(|least| *name < least)) {
                least = Some(name.to_vec());
            }
        }
        if let Some(name) = &least {
            self.0.iter_mut().for_each(|names| names.take_if(name));
        }
        Ok(least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    fn all(dir: &Path, budget: usize) -> Vec<Vec<u8>> {
        let node = Node::root(dir).unwrap();
        let mut names = SortedNames::with_budget(budget);
        let mut found = Vec::new();
        while let Some(name) = names.peek(&node).unwrap().map(<[u8]>::to_vec) {
            names.take_if(&name);
            found.push(name);
        }
        found
    }

    #[test]
    fn names_are_sorted_whatever_the_budget() {
        let dir = tempfile::tempdir().unwrap();
        let mut expected: Vec<Vec<u8>> =
            (0..500u32).map(|i| format!("{:x}", i * 7919).into_bytes()).collect();
        expected.push(b"\xff\n".to_vec());
        for name in &expected {
            std::fs::write(dir.path().join(std::ffi::OsStr::from_bytes(name)), "").unwrap();
        }
        expected.sort();
        for budget in [1, 1000, 1 << 20] {
            assert_eq!(all(dir.path(), budget), expected, "budget {budget}");
        }
    }

    #[test]
    fn merged_names_come_once() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        for (dir, names) in dirs.iter().zip([["a", "c"], ["b", "c"]]) {
            names.iter().for_each(|name| std::fs::write(dir.path().join(name), "").unwrap());
        }
        let mut names = MergedNames::new(2, 0);
        let mut found = Vec::new();
        let nodes = dirs.each_ref().map(|dir| Rc::new(Node::root(dir.path()).unwrap()));
        while let Some(name) = names.next(&nodes).unwrap() {
            found.push(name);
        }
        assert_eq!(found, [b"a", b"b", b"c"]);
    }
}
