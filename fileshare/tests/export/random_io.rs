//! Random reads, writes, truncations and mappings of one file, compared with a model, in the manner of fsx.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rustix::fs::FallocateFlags;
use vmctr_fileshare::export::host::Writes;

use super::apart::Spec;
use super::rig::{Mounted, Place, in_private_namespace};
use super::sys::Shared;

const LARGEST: usize = 300_000;

#[derive(Clone, Debug)]
enum Step {
    Write { at: usize, length: usize, value: u8 },
    Map { at: usize, length: usize, value: u8 },
    Truncate(usize),
    Punch { at: usize, length: usize },
    Reopen,
    Read { at: usize, length: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let place = (0..LARGEST - 70_000, 1..70_000usize);
    prop_oneof![
        4 => (place.clone(), any::<u8>()).prop_map(|((at, length), value)| Step::Write { at, length, value }),
        2 => (place.clone(), any::<u8>()).prop_map(|((at, length), value)| Step::Map { at, length, value }),
        1 => (0..LARGEST).prop_map(Step::Truncate),
        1 => place.clone().prop_map(|(at, length)| Step::Punch { at, length }),
        1 => Just(Step::Reopen),
        3 => place.prop_map(|(at, length)| Step::Read { at, length }),
    ]
}

struct Model {
    file: File,
    path: std::path::PathBuf,
    bytes: Vec<u8>,
}

impl Model {
    fn open(path: std::path::PathBuf) -> Self {
        let bytes = fs::read(&path).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        Self { file, path, bytes }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Write { at, length, value } => {
                self.file.write_all_at(&vec![value; length], at as u64).unwrap();
                self.bytes.resize(self.bytes.len().max(at + length), 0);
                self.bytes[at..at + length].fill(value);
            }
            Step::Map { at, length, value } => {
                let end = (at + length).min(self.bytes.len());
                if at < end {
                    let map = Shared::of(&self.file, end, true).unwrap();
                    (at..end).for_each(|at| map.set(at, value));
                    self.bytes[at..end].fill(value);
                }
            }
            Step::Truncate(length) => {
                self.file.set_len(length as u64).unwrap();
                self.bytes.resize(length, 0);
            }
            Step::Punch { at, length } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.file, flags, at as u64, length as u64).unwrap();
                let end = (at + length).min(self.bytes.len());
                if at < end {
                    self.bytes[at..end].fill(0);
                }
            }
            Step::Reopen => self.file = File::options().read(true).write(true).open(&self.path).unwrap(),
            Step::Read { at, length } => {
                let mut read = vec![0; length];
                let count = self.file.read_at(&mut read, at as u64).unwrap();
                let end = (at + length).min(self.bytes.len()).max(at);
                let wanted = self.bytes.get(at..end).unwrap_or_default();
                assert!(read[..count] == *wanted, "bytes from {at} differ");
            }
        }
        assert_eq!(self.file.metadata().unwrap().len(), self.bytes.len() as u64);
    }
}

fn run(writes: Writes, lending: bool) {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        let (folder, mountpoint) = (place.overlay("union", &lower), place.folder("mnt"));
        let layers = lending.then(|| (place.path("union/upper"), lower.clone()));
        let spec = Spec { folder: &folder, mountpoint: &mountpoint, writes, layers };
        let mounted = Mounted::apart(&spec);
        let count = std::cell::Cell::new(0);
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(16) };
        TestRunner::new(config)
            .run(&prop::collection::vec(step(), 1..60), |steps| {
                let name = format!("file{}", count.replace(count.get() + 1));
                let upper = place.path(&format!("union/upper/{name}"));
                fs::write(mounted.path(&name), vec![9; 10_000]).unwrap();
                let mut model = Model::open(mounted.path(&name));
                steps.iter().for_each(|step| model.apply(step));
                model.file.sync_all().unwrap();
                prop_assert!(fs::read(mounted.path(&name)).unwrap() == model.bytes);
                prop_assert!(fs::read(&upper).unwrap() == model.bytes);
                Ok(())
            })
            .unwrap();
        mounted.unmount();
    });
}

#[test]
fn a_file_is_what_was_written_to_it() {
    run(Writes::Through, false);
}

#[test]
fn a_file_is_what_was_written_to_it_on_the_host() {
    run(Writes::Through, true);
}

#[test]
fn a_file_is_what_was_written_to_it_when_writes_are_gathered() {
    run(Writes::Gathered, false);
}

#[test]
fn a_file_is_what_was_written_to_it_on_the_host_when_writes_are_gathered() {
    run(Writes::Gathered, true);
}
