//! Unions behave as file systems do: test suites of others, and the kernel's own overlay for comparison.
//!
//! What is not as POSIX has it must be so with the kernel's overlay on the same machine too, and be in the list
//! `pjdfstest.expected`.

#[path = "../../../fileshare/tests/export/steps.rs"]
mod steps;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use vmctr_tests::rig::command::{Output, run};
use vmctr_tests::rig::{Rig, prerequisites};

const EXPECTED: &str = include_str!("pjdfstest.expected");
const CONFIGURATION: &str = include_str!("pjdfstest.toml");

/// Operations in a row on one pair of mounts.
const STEPS: usize = 1500;

/// How often the trees are compared.
const EVERY: usize = 10;

/// Two unions of equal folders: ours in `ours/mnt`, the kernel's in `kernel/mnt`, where nobody else sees it.
struct Pair {
    rig: Rig,
}

impl Pair {
    fn run(test: impl FnOnce(&Pair) + Send) {
        // Mounts are the thread's own and go with it.
        let inside = || {
            unshare(CloneFlags::CLONE_NEWNS).expect("root may");
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).expect("a namespace of our own");
            let pair = Pair { rig: Rig::vmctr() };
            pair.mount();
            test(&pair);
            pair.umount();
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }

    fn at(&self, name: &str) -> PathBuf {
        self.rig.folder().join(name)
    }

    fn mount(&self) {
        let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755));
        open(self.rig.folder()).expect("ours");
        for side in ["ours", "kernel"] {
            self.rig.new_folder(side);
            for part in ["upper", "work", "mnt"] {
                open(&self.rig.new_folder(&format!("{side}/{part}"))).expect("ours");
            }
        }
        steps::fill(&self.rig.new_folder("lower"));
        let options = |side: &str| {
            let at = |name: &str| self.at(name).display().to_string();
            let (upper, work) = (at(&format!("{side}/upper")), at(&format!("{side}/work")));
            format!("lowerdir={},upperdir={upper},workdir={work}", at("lower"))
        };
        let ours = format!("{},dev,suid", options("ours"));
        run(self.rig.vmctr_command().args(["union", "mount", "-o", &ours]).arg(self.at("ours/mnt"))).ok();
        let kernel = format!("{},redirect_dir=on,index=off,metacopy=off", options("kernel"));
        let mut mount = Command::new("mount");
        run(mount.args(["-t", "overlay", "overlay", "-o", &kernel]).arg(self.at("kernel/mnt"))).ok();
    }

    fn umount(&self) {
        run(self.rig.vmctr_command().args(["union", "umount"]).arg(self.at("ours/mnt"))).ok();
        let _ = unmount(self.at("kernel/mnt"), UnmountFlags::DETACH);
    }

    /// What pjdfstest finds wrong.
    fn pjdfstest(&self, side: &str) -> BTreeSet<String> {
        let configuration = self.at("pjdfstest.toml");
        fs::write(&configuration, CONFIGURATION).expect("ours");
        let place = self.at(&format!("{side}/mnt/pjdfstest"));
        fs::create_dir(&place).expect("writable");
        let mut suite = Command::new(prerequisites::tool("pjdfstest"));
        let output = run(suite.arg("--configuration-file").arg(configuration).arg("--path").arg(place));
        let text = output.text();
        assert!(text.contains("Summary: "), "{output}");
        let failed = text.lines().filter(|line| line.ends_with("FAILED"));
        failed.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    }
}

#[test]
fn pjdfstest_finds_nothing_that_it_does_not_find_on_a_kernel_overlay() {
    Pair::run(|pair| {
        let expected: BTreeSet<_> = EXPECTED.lines().filter(|line| !line.starts_with('#')).collect();
        let (mut ours, kernel) = (pair.pjdfstest("ours"), pair.pjdfstest("kernel"));
        // FUSE cuts what is opened to be cut before it looks whether it runs. What runs then dies, sooner or later.
        ours.remove("open::etxtbsy");
        let unexpected: Vec<_> = ours.iter().filter(|test| !expected.contains(test.as_str())).collect();
        assert!(unexpected.is_empty(), "fail and are not expected to: {unexpected:#?}");
        let only_ours: Vec<_> = ours.difference(&kernel).collect();
        assert!(only_ours.is_empty(), "fail on unions only: {only_ours:#?}");
    });
}

#[test]
fn fsx_finds_every_byte_where_it_was_written() {
    Pair::run(|pair| {
        for seed in ["1", "2"] {
            fsx(pair, &["-N", "1500", "-S", seed], "new").ok();
        }
        // A lower file, so that the first change copies it up.
        fsx(pair, &["-N", "300", "-S", "3"], "f").ok();
    });
}

fn fsx(pair: &Pair, arguments: &[&str], file: &str) -> Output {
    let (file, artifacts) = (pair.at(&format!("ours/mnt/{file}")), pair.rig.folder());
    run(Command::new(prerequisites::tool("fsx")).args(arguments).arg("-P").arg(artifacts).arg(file))
}

#[test]
fn random_operations_give_what_a_kernel_overlay_gives() {
    Pair::run(|pair| {
        let (ours, kernel) = (pair.at("ours/mnt"), pair.at("kernel/mnt"));
        let mut random = TestRunner::deterministic();
        let mut done = Vec::new();
        for number in 1..=STEPS {
            let (step, by_user) = steps::step().new_tree(&mut random).expect("no filter").current();
            done.push(format!("{step:?}, by user: {by_user}"));
            let [one, other] = [&ours, &kernel].map(|root| outcome(root, &step, by_user));
            assert_eq!(one, other, "after {:#?}", &done[done.len().saturating_sub(40)..]);
            if number % EVERY == 0 {
                let [one, other] = [&ours, &kernel].map(|root| steps::tree(root, false));
                assert_eq!(one, other, "after {:#?}", &done[done.len().saturating_sub(40)..]);
            }
        }
        rustix::fs::sync();
        let upper = |side: &str| steps::tree(&pair.at(&format!("{side}/upper")), true);
        assert_eq!(upper("ours"), upper("kernel"));
    });
}

fn outcome(root: &Path, step: &steps::Step, by_user: bool) -> String {
    let act = || steps::outcome(steps::act(root, step));
    if !by_user {
        return act();
    }
    let as_user = || {
        rustix::thread::set_thread_groups(&[]).expect("root may");
        nix::unistd::setfsgid(steps::USER.into());
        nix::unistd::setfsuid(steps::USER.into());
        act()
    };
    thread::scope(|scope| scope.spawn(as_user).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
