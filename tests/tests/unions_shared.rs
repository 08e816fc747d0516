//! Several unions of one user in one helper VM, as a user sees them.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use vmctr_tests::rig::command::{Output, eventually, run};
use vmctr_tests::rig::vm::signal;
use vmctr_tests::rig::{Rig, proc};

/// How soon a union whose VM or share is gone must say so.
const SOON: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

/// As many unions as fit in a VM.
const PORTS: usize = 8;

/// Unions by their names: `a` has the folders `a-low`, `a-up`, `a-work` and `a`.
struct Unions<'rig>(&'rig Rig);

impl<'rig> Unions<'rig> {
    fn new(rig: &'rig Rig, names: &[&str]) -> Self {
        for name in names {
            for folder in ["low", "up", "work"] {
                rig.new_folder(&format!("{name}-{folder}"));
            }
            rig.new_folder(name);
            fs::write(rig.folder().join(format!("{name}-low/name")), name).expect("writable");
        }
        Self(rig)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.folder().join(path)
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
    }

    fn options(&self, name: &str) -> String {
        let at = |folder: &str| self.at(&format!("{name}-{folder}")).display().to_string();
        format!("lowerdir={},upperdir={},workdir={}", at("low"), at("up"), at("work"))
    }

    fn vmctr(&self, args: &[&str]) -> Output {
        run(self.0.vmctr_command().arg("union").args(args))
    }

    fn try_mount(&self, name: &str, more: &[&str]) -> Output {
        let (options, place) = (self.options(name), self.at(name).display().to_string());
        self.vmctr(&[&["mount", "-o", &options, &place], more].concat())
    }

    fn mount(&self, name: &str) {
        self.try_mount(name, &[]).ok();
        assert_eq!(self.text(&format!("{name}/name")), name);
    }

    fn umount(&self, name: &str) {
        self.vmctr(&["umount", &self.at(name).to_string_lossy()]).ok();
    }

    fn list(&self) -> Vec<Value> {
        self.vmctr(&["ls", "--json"]).ok().json().as_array().expect("a list").clone()
    }

    fn of(&self, name: &str) -> Value {
        let place = self.at(name).display().to_string();
        let found = self.list().into_iter().find(|union| union["mountpoint"] == place.as_str());
        found.unwrap_or_else(|| panic!("{name} is not listed"))
    }

    fn process(&self, name: &str, role: &str) -> u32 {
        u32::try_from(self.of(name)[role].as_u64().expect("it lives")).expect("a process ID")
    }

    /// The VMs that serve unions.
    fn vms(&self) -> BTreeSet<u64> {
        self.list().iter().filter_map(|union| union["qemu_pid"].as_u64()).collect()
    }

    fn works(&self, name: &str) -> bool {
        let file = self.at(&format!("{name}/proof"));
        fs::write(&file, "proof").is_ok() && fs::read(&file).is_ok_and(|bytes| bytes == b"proof")
    }

    fn fails(&self, name: &str) -> bool {
        let error = fs::write(self.at(&format!("{name}/after")), "x").err();
        matches!(error.and_then(|error| error.raw_os_error()), Some(nix::libc::EIO | nix::libc::ENOTCONN))
    }
}

#[test]
fn two_unions_share_a_vm_and_nothing_else() {
    let rig = Rig::vmctr();
    let unions = Unions::new(&rig, &["a", "b"]);
    unions.mount("a");
    unions.mount("b");
    assert_eq!(unions.vms().len(), 1, "{:?}", unions.list());
    assert_eq!(unions.process("a", "pid"), unions.process("b", "pid"));
    assert_ne!(unions.process("a", "fsd_pid"), unions.process("b", "fsd_pid"));
    let vm = unions.process("a", "qemu_pid");
    fs::write(unions.at("a/only"), "a").expect("writable");
    assert!(!unions.at("b/only").exists());

    let mut used = fs::File::create(unions.at("b/used")).expect("writable");
    used.write_all(b"before, ").expect("writable");
    unions.umount("a");
    assert_eq!(unions.text("a-up/only"), "a");
    assert!(!unions.at("a/only").exists());
    used.write_all(b"after").and_then(|()| used.sync_all()).expect("b goes on");
    drop(used);
    assert_eq!(unions.text("b-up/used"), "before, after");

    // The port of the first is free again, with other folders in it.
    for _ in 0..3 {
        unions.mount("a");
        assert_eq!(unions.process("a", "qemu_pid"), vm);
        assert_eq!(unions.text("a/only"), "a");
        unions.umount("a");
    }
    unions.umount("b");
    assert!(!proc::is_alive(vm));
    assert_eq!(unions.list(), Vec::<Value>::new());
}

#[test]
fn a_union_may_have_a_vm_of_its_own() {
    let rig = Rig::vmctr();
    let unions = Unions::new(&rig, &["a", "b", "d"]);
    unions.try_mount("a", &["--own-vm"]).ok();
    unions.mount("b");
    unions.try_mount("d", &["-o", "own_vm"]).ok();
    assert_eq!(unions.vms().len(), 3, "{:?}", unions.list());
    for name in ["a", "b", "d"] {
        assert!(unions.works(name));
        unions.umount(name);
    }
}

#[test]
fn a_union_that_finds_its_vm_full_gets_another() {
    let rig = Rig::vmctr();
    let names: Vec<_> = (0..=PORTS).map(|number| format!("u{number}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let unions = Unions::new(&rig, &names);
    names[..PORTS].iter().for_each(|name| unions.mount(name));
    assert_eq!(unions.vms().len(), 1);
    unions.mount(names[PORTS]);
    assert_eq!(unions.vms().len(), 2);
    assert!(names.iter().all(|name| unions.works(name)));
    names.iter().for_each(|name| unions.umount(name));
}

#[test]
fn mounts_at_the_same_moment_find_each_other() {
    let rig = Rig::vmctr();
    let names = ["a", "b", "d", "e"];
    let unions = Unions::new(&rig, &names);
    let mounts = names.map(|name| {
        let mut mount = rig.vmctr_command();
        mount.args(["union", "mount", "-o", &unions.options(name)]).arg(unions.at(name));
        thread::spawn(move || run(&mut mount))
    });
    for mount in mounts {
        mount.join().expect("it ran").ok();
    }
    assert_eq!(unions.vms().len(), 1, "{:?}", unions.list());
    assert!(names.iter().all(|name| unions.works(name)));
    let umounts = names.map(|name| {
        let mut umount = rig.vmctr_command();
        umount.args(["union", "umount"]).arg(unions.at(name));
        thread::spawn(move || run(&mut umount))
    });
    for umount in umounts {
        umount.join().expect("it ran").ok();
    }
    assert!(names.iter().all(|name| unions.at(&format!("{name}-up/proof")).exists()));
}

#[test]
fn a_mount_that_fails_leaves_the_others_alone() {
    let rig = Rig::vmctr();
    let unions = Unions::new(&rig, &["a", "b"]);
    unions.mount("a");
    let (low, up) = (unions.at("b-low").display().to_string(), unions.at("a-up").display().to_string());
    let (work, place) = (unions.at("b-work").display().to_string(), unions.at("b").display().to_string());
    let twice =
        unions.vmctr(&["mount", "-o", &format!("lowerdir={low},upperdir={up},workdir={work}"), &place]);
    assert!(twice.code() == 125 && twice.errors().contains("is in use by another union"), "{twice}");
    assert_eq!(unions.list().len(), 1);
    assert!(unions.works("a"));
    unions.mount("b");
    assert_eq!(unions.vms().len(), 1);
    unions.umount("a");
    unions.umount("b");
}

#[test]
fn when_their_process_is_killed_all_its_unions_fail_and_can_be_mounted_again() {
    let rig = Rig::vmctr();
    let unions = Unions::new(&rig, &["a", "b"]);
    unions.mount("a");
    unions.mount("b");
    let (owner, vm) = (unions.process("a", "pid"), unions.process("a", "qemu_pid"));
    signal(owner, Signal::SIGKILL);
    eventually("both fail", SOON, || ["a", "b"].iter().all(|name| fs::read_dir(unions.at(name)).is_err()));
    eventually("the VM is gone", PATIENCE, || !proc::is_alive(vm));
    for name in ["a", "b"] {
        eventually("it is listed as dead", SOON, || unions.of(name)["state"] == "dead");
        unions.umount(name);
        unions.mount(name);
    }
    assert_eq!(unions.vms().len(), 1);
    unions.umount("b");
    unions.umount("a");
}

#[test]
fn when_their_vm_is_killed_all_its_unions_fail_and_can_be_mounted_again() {
    let rig = Rig::vmctr();
    let unions = Unions::new(&rig, &["a", "b"]);
    unions.mount("a");
    unions.mount("b");
    signal(unions.process("a", "qemu_pid"), Signal::SIGKILL);
    eventually("both fail", SOON, || unions.fails("a") && unions.fails("b"));
    for name in ["a", "b"] {
        eventually("it is listed as lost", SOON, || unions.of(name)["state"] == "lost");
    }
    // The other one is still there, lost, when the first has a new VM.
    unions.umount("a");
    unions.mount("a");
    assert!(unions.works("a") && unions.fails("b"));
    unions.umount("b");
    unions.mount("b");
    assert_eq!(unions.vms().len(), 1);
    unions.umount("a");
    unions.umount("b");
}

#[test]
fn when_a_share_daemon_is_killed_only_its_union_fails() {
    let rig = Rig::vmctr();
    let unions = Unions::new(&rig, &["a", "b"]);
    unions.mount("a");
    unions.mount("b");
    let daemon = unions.process("a", "fsd_pid");
    signal(daemon, Signal::SIGKILL);
    eventually("a fails", SOON, || unions.fails("a"));
    eventually("it is listed as lost", SOON, || unions.of("a")["state"] == "lost");
    let why = unions.of("a")["lost"].as_str().expect("a reason").to_owned();
    assert!(why.contains("share daemon ended"), "{why}");
    assert!(unions.works("b"));
    unions.umount("a");
    unions.mount("a");
    assert!(unions.works("a") && unions.works("b"));
    unions.umount("a");
    unions.umount("b");
}

#[test]
fn a_union_in_another_mount_namespace_has_another_vm() {
    let rig = Rig::vmctr();
    let unions = Unions::new(&rig, &["a", "b"]);
    unions.mount("a");
    let vmctr = rig.vmctr_command();
    let mut inside = std::process::Command::new("unshare");
    let script = format!(
        "\"$@\" union mount -o {} {b}; cat {b}/name; \"$@\" --json union ls | grep -c '\"qemu_pid\"'; umount {b}",
        unions.options("b"),
        b = unions.at("b").display()
    );
    inside.args(["-m", "--propagation", "private", "sh", "-ec", &script, "sh"]);
    inside.arg(vmctr.get_program()).args(vmctr.get_args());
    inside.envs(vmctr.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = run(&mut inside).ok();
    assert!(output.text().starts_with('b'), "{output}");
    assert!(!unions.at("b/name").exists());
    eventually("only one is left", PATIENCE, || unions.list().len() == 1);
    unions.umount("a");
}
