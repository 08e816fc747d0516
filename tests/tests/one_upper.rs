//! One folder takes the changes of one container or union, whichever came first.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::{Output, eventually, run};
use vmctr_tests::rig::container::Run;
use vmctr_tests::rig::vm::{Vm, signal};

const PATIENCE: Duration = Duration::from_secs(60);

/// A root folder, a folder for its changes, and what a union of them needs besides.
struct Place<'rig> {
    rig: &'rig Rig,
    root: PathBuf,
    changes: PathBuf,
}

impl<'rig> Place<'rig> {
    fn new(rig: &'rig Rig) -> Self {
        for name in ["w", "other", "mnt"] {
            rig.new_folder(name);
        }
        Self { rig, root: rig.busybox_root("root", &[]), changes: rig.new_folder("changes") }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.rig.folder().join(name)
    }

    fn container(&self, name: &str, upper: &Path) -> Run<'rig> {
        self.rig.container_in(&self.root, name).annotation("io.vmctr.upper-dir", upper.display())
    }

    fn union(&self, lower: &Path, upper: &Path) -> Output {
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            self.at("w").display()
        );
        run(self.rig.vmctr_command().args(["union", "mount", "-o", &options]).arg(self.at("mnt")))
    }

    fn refused(&self, lower: &Path, upper: &Path, because: &Path) {
        let output = self.union(lower, upper);
        let words = format!("{} is in use by another union or container", because.display());
        assert!(output.code() == 125 && output.errors().contains(&words), "{output} does not say {words:?}");
    }

    fn umount(&self) {
        run(self.rig.vmctr_command().args(["union", "umount"]).arg(self.at("mnt"))).ok();
    }
}

#[test]
fn no_union_takes_the_folders_of_a_container() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let other = place.at("other");
    let first = place.container("first", &place.changes).sh("echo first > /first; sleep 1000").detached();
    eventually("it runs", PATIENCE, || place.changes.join("first").exists());
    place.refused(&place.root, &place.changes, &place.changes);
    place.refused(&place.changes, &other, &place.changes);
    place.refused(&other, &place.root, &place.root);
    let second = place.container("second", &place.changes).sh("true").output();
    second.fails_naming(&["in use by another union or container", &place.changes.to_string_lossy()]);
    // What both only read, both may have.
    place.union(&place.root, &other).ok();
    place.umount();

    // A shim that is killed keeps nothing.
    signal(Vm::of(&rig, first.id()).shim, Signal::SIGKILL);
    eventually("its folders are free", PATIENCE, || place.union(&place.root, &place.changes).code() == 0);
    assert_eq!(fs::read_to_string(place.at("mnt/first")).expect("readable"), "first\n");
    place.umount();
    first.forget();
}

#[test]
fn no_union_takes_the_snapshot_of_a_container() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let container = rig.container("image").sh("sleep 1000").detached();
    let mounts = rig.ctr_run(&["snapshots", "mounts", "/x", container.id()]).ok().text();
    let option = |name| mounts.split([',', ' ', '\n']).find_map(|option| option.strip_prefix(name));
    let snapshot = PathBuf::from(option("upperdir=").expect("an upper"));
    place.refused(&place.root, &snapshot, &snapshot);
    container.remove();
}

#[test]
fn no_container_takes_the_folders_of_a_union() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.union(&place.root, &place.changes).ok();
    let refused = place.container("same", &place.changes).sh("true").output();
    refused.fails_naming(&["in use by another union or container", &place.changes.to_string_lossy()]);
    let as_root = rig.container_in(&place.root, "root").sh("true").output();
    let words = ["in use by another union or container", "io.vmctr.upper=guest"];
    as_root.fails_naming(&[&words[..], &[&place.root.to_string_lossy()]].concat());
    place.container("beside", &place.at("other")).sh("echo beside > /beside").output().ok();
    assert_eq!(fs::read_to_string(place.at("other/beside")).expect("there"), "beside\n");
    assert!(!place.at("mnt/beside").exists());
    place.umount();
    place.container("after", &place.changes).sh("echo after > /after").output().ok();
    assert_eq!(fs::read_to_string(place.changes.join("after")).expect("there"), "after\n");
}
