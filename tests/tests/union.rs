//! Union mounts by a helper VM, as a user sees them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmctr_tests::rig::command::{Output, Running, eventually, run};
use vmctr_tests::rig::vm::signal;
use vmctr_tests::rig::{Rig, prerequisites, proc};

/// How soon a union whose VM is gone must say so.
const SOON: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

/// The folders of a union, and the commands for it.
struct Place<'rig> {
    rig: &'rig Rig,
}

impl<'rig> Place<'rig> {
    /// Two lower folders with something in them, an empty upper folder.
    fn new(rig: &'rig Rig) -> Self {
        for name in ["top", "base", "upper", "work", "mnt"] {
            rig.new_folder(name);
        }
        let place = Self { rig };
        for folder in ["base/dir", "base/gone", "top/dir"] {
            fs::create_dir(place.at(folder)).expect("writable");
        }
        for (file, text) in [
            ("base/dir/below", "below\n"),
            ("base/dir/hidden", "hidden\n"),
            ("base/gone/file", "gone\n"),
            ("base/shared", "base\n"),
            ("base/changed", "before\n"),
            ("top/shared", "top\n"),
            ("top/dir/above", "above\n"),
        ] {
            fs::write(place.at(file), text).expect("writable");
        }
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.rig.folder().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_else(|e| panic!("cannot read {name}: {e}"))
    }

    fn options(&self) -> String {
        let at = |name| self.at(name).display().to_string();
        format!("lowerdir={}:{},upperdir={},workdir={}", at("top"), at("base"), at("upper"), at("work"))
    }

    fn vmctr(&self, args: &[&str]) -> Output {
        run(self.rig.vmctr_command().arg("union").args(args))
    }

    fn try_mount(&self, options: &str, mountpoint: &str) -> Output {
        self.vmctr(&["mount", "-o", options, &self.at(mountpoint).to_string_lossy()])
    }

    fn mount(&self) {
        self.try_mount(&self.options(), "mnt").ok();
    }

    fn umount(&self) {
        self.vmctr(&["umount", &self.at("mnt").to_string_lossy()]).ok();
        assert_eq!(self.list(), Vec::<Value>::new());
    }

    fn list(&self) -> Vec<Value> {
        let list = self.vmctr(&["ls", "--json"]).ok().json();
        list.as_array().expect("a list").clone()
    }

    /// A process of the only union.
    fn process(&self, name: &str) -> u32 {
        let list = self.list();
        assert_eq!(list.len(), 1, "{list:?}");
        u32::try_from(list[0][name].as_u64().expect("it lives")).expect("a process ID")
    }

    fn shell(&self, script: &str) -> Output {
        run(Command::new("sh").args(["-ec", script]).current_dir(self.rig.folder()))
    }

    /// The same folders under this host's own overlay, where nobody else sees it.
    fn by_the_kernel(&self, script: &str) -> Output {
        let options = format!("{},redirect_dir=on,index=off,metacopy=off", self.options());
        let script = format!("mount -t overlay overlay -o {options} mnt\n{script}");
        let inside = ["-m", "--propagation", "private", "sh", "-ec", &script];
        run(Command::new("unshare").args(inside).current_dir(self.rig.folder()))
    }
}

/// Prints a tree: types, permissions, owners, sizes, times, names, link targets, contents.
const TREE: &str = "cd mnt; find . ! -name . -type d -printf '%y %m %U:%G %T@ %p\\n' -o ! -name . \
                    -printf '%y %m %U:%G %s %n %T@ %p %l\\n' | sort; find . -type f | sort | xargs sha256sum";

/// Changes of every kind.
const WORK: &str = "cd mnt; echo after >> changed; echo new > new; rm dir/hidden; rm -r gone; mkdir gone; \
                    echo again > gone/again; mv dir renamed; chmod 640 shared; ln new link; ln -s new soft; \
                    mkfifo pipe; mkdir -m 1777 sticky; chown 1000:1000 sticky; touch -d @1000000000.5 new; \
                    truncate -s 3 renamed/below; sync -f new";

#[test]
fn what_is_done_in_a_union_is_what_an_overlay_finds() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    assert!(
        proc::mounts(std::process::id()).iter().all(|mount| mount.kind != "overlay" || mount.point == "/")
    );
    assert_eq!(place.text("mnt/shared"), "top\n");
    assert_eq!(place.text("mnt/dir/below"), "below\n");
    place.shell(WORK).ok();
    let ours = place.shell(TREE).ok().text();
    assert!(ours.contains("renamed/above") && !ours.contains("hidden"), "{ours}");
    place.umount();

    assert!(fs::symlink_metadata(place.at("upper/dir")).expect("a whiteout").file_type().is_char_device());
    assert_eq!(place.text("upper/changed"), "before\nafter\n");
    assert_eq!(place.text("base/changed"), "before\n");
    assert_eq!(place.by_the_kernel(TREE).ok().text(), ours);

    place.by_the_kernel("mv mnt/renamed mnt/again; rm mnt/link; echo more >> mnt/shared").ok();
    let theirs = place.by_the_kernel(TREE).ok().text();
    place.mount();
    assert_eq!(place.shell(TREE).ok().text(), theirs);
    place.umount();
}

#[test]
fn a_union_without_upper_is_read_only() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let at = |name| place.at(name).display().to_string();
    place.try_mount(&format!("lowerdir={}:{}", at("top"), at("base")), "mnt").ok();
    assert_eq!(place.text("mnt/shared"), "top\n");
    let error = fs::write(place.at("mnt/new"), "").expect_err("it is read-only");
    assert_eq!(error.raw_os_error(), Some(nix::libc::EROFS));
    place.umount();
    place.try_mount(&format!("lowerdir={}", at("base")), "mnt").ok();
    assert_eq!(place.text("mnt/shared"), "base\n");
    place.umount();
}

#[test]
fn names_with_colons_and_commas_are_mounted() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    fs::write(rig.new_folder("a:b,c").join("file"), "odd\n").expect("writable");
    let at = |name| place.at(name).display().to_string();
    place.try_mount(&format!(r"lowerdir={}:{}", at(r"a\:b\,c"), at("base")), "mnt").ok();
    assert_eq!(place.text("mnt/file"), "odd\n");
    place.umount();
}

#[test]
fn what_cannot_be_mounted_is_refused_in_words() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let at = |name| place.at(name).display().to_string();
    let (base, upper, work) = (at("base"), at("upper"), at("work"));
    for (options, mountpoint, words) in [
        (format!("lowerdir={base}/none"), "mnt", "Cannot use the lower folder"),
        (
            format!("lowerdir={base},upperdir={base}/dir,workdir={work}"),
            "mnt",
            "lies inside the lower folder",
        ),
        (
            format!("lowerdir={base}/dir,upperdir={base},workdir={work}"),
            "mnt",
            "lies inside the upper folder",
        ),
        (format!("lowerdir={base},upperdir={upper},workdir=/dev/shm"), "mnt", "is on another mount"),
        (format!("lowerdir={base},upperdir={upper}"), "mnt", "workdir= is missing"),
        (format!("lowerdir={base},volatile"), "mnt", "\"volatile\" is not known"),
        (format!("lowerdir={base}"), "top", "is not empty"),
        (format!("lowerdir={base}"), "none", "Cannot use the mountpoint"),
    ] {
        let output = place.try_mount(&options, mountpoint);
        assert_eq!(output.code(), 125, "{output}");
        assert!(output.errors().contains(words), "{output} does not say {words:?}");
    }
    let none = place.vmctr(&["umount", &at("mnt")]);
    assert!(none.code() == 127 && none.errors().contains("No union or container is mounted"), "{none}");
}

#[test]
fn an_upper_folder_belongs_to_one_union() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    for name in ["mnt2", "upper2", "work2"] {
        rig.new_folder(name);
    }
    place.mount();
    let at = |name| place.at(name).display().to_string();
    for options in [
        format!("lowerdir={},upperdir={},workdir={}", at("base"), at("upper"), at("work2")),
        format!("lowerdir={},upperdir={},workdir={}", at("base"), at("upper2"), at("work")),
        format!("lowerdir={},upperdir={},workdir={}", at("upper2"), at("base"), at("work2")),
        format!("lowerdir={}", at("upper")),
    ] {
        let output = place.try_mount(&options, "mnt2");
        assert!(output.code() == 125 && output.errors().contains("is in use by another union"), "{output}");
    }
    let again = place.try_mount(&place.options(), "mnt");
    assert!(again.errors().contains("A union is mounted on"), "{again}");
    place.umount();
}

#[test]
fn folders_of_two_unions_do_not_overlap_where_one_changes_them() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.shell("mkdir mnt2 work2 upper/below base/inner base/inner/upper base/inner/work").ok();
    place.mount();
    let at = |name| place.at(name).display().to_string();
    let inner = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("top"),
        at("base/inner/upper"),
        at("base/inner/work")
    );
    for options in [inner, format!("lowerdir={}", at("upper/below"))] {
        let output = place.try_mount(&options, "mnt2");
        assert!(output.code() == 125 && output.errors().contains("overlaps the"), "{output}");
    }
    // Both may show what neither changes.
    place.try_mount(&format!("lowerdir={}", at("base/dir")), "mnt2").ok();
    place.vmctr(&["umount", &at("mnt2")]).ok();
    place.umount();
}

#[test]
fn a_layer_in_another_one_is_found_behind_a_bind_mount() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let bound = rig.new_folder("bound").display().to_string();
    place.shell("mkdir base/upper base/work; mount --bind base bound").ok();
    let base = place.at("base").display().to_string();
    let options = format!("lowerdir={bound},upperdir={base}/upper,workdir={base}/work");
    let refused = place.try_mount(&options, "mnt");
    run(Command::new("umount").arg(&bound)).ok();
    assert!(refused.code() == 125 && refused.errors().contains("lies inside the lower folder"), "{refused}");
}

#[test]
fn a_mount_waits_for_the_one_before_it_to_leave_whoever_owns_that() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let lower = format!("lowerdir={}", place.at("base").display());
    for options in [lower.clone(), format!("{lower},own_vm"), lower] {
        place.try_mount(&options, "mnt").ok();
        assert_eq!(place.text("mnt/shared"), "base\n");
        run(Command::new("umount").arg(place.at("mnt"))).ok();
    }
    eventually("the last union is gone", PATIENCE, || place.list().is_empty());
}

#[test]
fn when_the_vm_is_killed_the_union_fails_at_once_and_can_be_mounted_again() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    let mut synced = File::create(place.at("mnt/synced")).expect("writable");
    synced.write_all(b"kept\n").and_then(|()| synced.sync_all()).expect("synced");
    drop(synced);
    signal(place.process("qemu_pid"), Signal::SIGKILL);
    let killed = Instant::now();
    let fails = || {
        let error = fs::write(place.at("mnt/after"), "x").err().and_then(|error| error.raw_os_error());
        matches!(error, Some(nix::libc::EIO | nix::libc::ENOTCONN))
    };
    eventually("the union fails", SOON, fails);
    assert!(killed.elapsed() < SOON);
    eventually("it is listed as lost", SOON, || place.list()[0]["state"] == "lost");
    place.umount();
    assert_eq!(place.text("upper/synced"), "kept\n");
    place.mount();
    assert_eq!(place.text("mnt/synced"), "kept\n");
    place.umount();
}

#[test]
fn when_the_host_process_is_killed_what_is_left_is_listed_and_cleared() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    let (pid, qemu) = (place.process("pid"), place.process("qemu_pid"));
    signal(pid, Signal::SIGKILL);
    eventually("the union fails", SOON, || fs::read_dir(place.at("mnt")).is_err());
    eventually("the VM is gone", PATIENCE, || !proc::is_alive(qemu));
    eventually("it is listed as dead", PATIENCE, || place.list()[0]["state"] == "dead");
    let left = place.list();
    let command = left[0]["clean_up"].as_str().expect("a command");
    assert!(command.starts_with("vmctr union umount /"), "{command}");
    let again = place.try_mount(&place.options(), "mnt");
    assert_eq!(again.code(), 125, "{again}");
    place.umount();
    place.mount();
    assert_eq!(place.text("mnt/shared"), "top\n");
    place.umount();
}

#[test]
fn umount_and_sigterm_end_a_union_too() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    fs::write(place.at("mnt/new"), "new\n").expect("writable");
    run(Command::new("umount").arg(place.at("mnt"))).ok();
    eventually("the union is gone", PATIENCE, || place.list().is_empty());
    assert_eq!(place.text("upper/new"), "new\n");
    place.mount();
    fs::write(place.at("mnt/newer"), "newer\n").expect("writable");
    signal(place.process("pid"), Signal::SIGTERM);
    eventually("the union is gone", PATIENCE, || place.list().is_empty());
    assert_eq!(place.text("upper/newer"), "newer\n");
}

#[test]
fn a_union_in_use_is_taken_away_lazily_only() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    let mut file = File::open(place.at("mnt/shared")).expect("readable");
    let mnt = place.at("mnt").display().to_string();
    let busy = place.vmctr(&["umount", &mnt]);
    assert!(busy.code() == 125 && busy.errors().contains("-l"), "{busy}");
    place.vmctr(&["umount", "-l", &mnt]).ok();
    assert!(is_empty(&place.at("mnt")));
    let mut text = String::new();
    file.read_to_string(&mut text).expect("still readable");
    assert_eq!(text, "top\n");
    drop(file);
    eventually("the union is gone", PATIENCE, || place.list().is_empty());
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).expect("readable").next().is_none()
}

#[test]
fn mount_8_and_fstab_mount_a_union() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let bin = rig.new_folder("bin");
    symlink(prerequisites::binary("vmctr"), bin.join("mount.fuse.vmctr")).expect("writable");
    // mount(8) looks for its helpers in /sbin: there, for this one process and its children only.
    let fstab = format!(
        "vmctr {} fuse.vmctr {},noauto,nofail,users,_netdev 0 0\n",
        place.at("mnt").display(),
        place.options()
    );
    fs::write(place.at("fstab"), fstab).expect("writable");
    let script = format!(
        "mount -t overlay overlay -o lowerdir=$PWD/bin:/usr/sbin /usr/sbin\n\
         mount -t fuse.vmctr vmctr $PWD/mnt -o {}\n\
         grep \"vmctr $PWD/mnt fuse.vmctr \" /proc/mounts | wc -l\n\
         cat mnt/shared; echo new > mnt/new; umount $PWD/mnt\n\
         mount -T $PWD/fstab $PWD/mnt; cat mnt/new; umount $PWD/mnt",
        place.options()
    );
    let mut mount = Command::new("unshare");
    mount.args(["-m", "--propagation", "private", "sh", "-ec", &script]).current_dir(rig.folder());
    mount.envs(rig.vmctr_command().get_envs().filter_map(|(name, value)| Some((name, value?))));
    run(&mut mount).ok().prints("1\ntop\nnew");
    eventually("the union is gone", PATIENCE, || place.list().is_empty());
    assert_eq!(place.text("upper/new"), "new\n");
}

#[test]
fn fifty_lower_folders_are_one() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let lower = |number: u32| {
        let folder = rig.new_folder(&format!("lower{number}"));
        fs::write(folder.join(format!("of{number}")), "").expect("writable");
        fs::write(folder.join("common"), number.to_string()).expect("writable");
        folder.display().to_string()
    };
    let lowers: Vec<_> = (0..50).map(lower).collect();
    place.try_mount(&format!("lowerdir={}", lowers.join(":")), "mnt").ok();
    assert_eq!(fs::read_dir(place.at("mnt")).expect("readable").count(), 51);
    assert_eq!(place.text("mnt/common"), "0");
    place.umount();
}

#[test]
fn many_processes_work_in_a_union_at_the_same_time() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    let writers = "for i in $(seq 64); do (for j in 1 2 3; do echo $i-$j >> mnt/changed; mkdir -p mnt/many/$i; \
                   echo $j > mnt/many/$i/$j; done) & done; wait; wc -l < mnt/changed; find mnt/many -type f | wc -l";
    place.shell(writers).ok().prints("193\n192");
    let locks =
        "flock -n mnt/shared sh -c 'flock -n mnt/shared true || echo refused'; flock -n mnt/shared echo free";
    place.shell(locks).ok().prints("refused\nfree");
    place.umount();
    assert_eq!(place.text("upper/changed").lines().count(), 193);
}

#[test]
fn a_full_disk_is_told_and_the_union_goes_on() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let small = rig.new_folder("small").display().to_string();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "small", &small])).ok();
    place.shell("mkdir small/upper small/work").ok();
    let base = place.at("base").display().to_string();
    place.try_mount(&format!("lowerdir={base},upperdir={small}/upper,workdir={small}/work"), "mnt").ok();
    let full = fs::write(place.at("mnt/big"), vec![0; 8 << 20]).expect_err("the disk is full");
    assert_eq!(full.raw_os_error(), Some(nix::libc::ENOSPC));
    place.shell("rm mnt/big; echo fits > mnt/fits; sync -f mnt/fits").ok();
    assert_eq!(place.text("mnt/fits"), "fits\n");
    place.umount();
    assert_eq!(place.text("small/upper/fits"), "fits\n");
    run(Command::new("umount").arg(&small)).ok();
}

#[test]
fn folders_whose_file_system_keeps_no_attributes_are_refused() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let plain = rig.new_folder("plain").display().to_string();
    run(Command::new("mount").args(["-t", "ramfs", "plain", &plain])).ok();
    place.shell("mkdir plain/lower plain/upper plain/work; echo plain > plain/lower/file").ok();
    let base = place.at("base").display().to_string();
    let options = format!("lowerdir={base},upperdir={plain}/upper,workdir={plain}/work");
    let refused = place.try_mount(&options, "mnt");
    assert!(refused.code() == 125 && refused.errors().contains("keeps no trusted"), "{refused}");
    // Of lower folders nothing is asked.
    place.try_mount(&format!("lowerdir={plain}/lower:{base}"), "mnt").ok();
    assert_eq!(place.text("mnt/file"), "plain\n");
    place.umount();
    run(Command::new("umount").arg(&plain)).ok();
}

#[test]
fn changes_that_could_not_be_written_in_the_end_are_listed_until_somebody_clears_them() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    fs::write(place.at("mnt/new"), "new\n").expect("writable");
    let (qemu, fsd) = (place.process("qemu_pid"), place.process("fsd_pid"));
    // It cannot answer any more; the end of the share daemon then ends it. umount(8) would ask it first.
    signal(qemu, Signal::SIGSTOP);
    place.vmctr(&["umount", "-l", &place.at("mnt").to_string_lossy()]).ok();
    eventually("it is writing", PATIENCE, || place.list()[0]["state"] == "changing");
    signal(fsd, Signal::SIGKILL);
    eventually("the process ends", PATIENCE, || place.list()[0]["state"] == "dead");
    let left = place.list();
    assert!(left[0]["lost"].as_str().is_some_and(|why| why.contains("may be lost")), "{left:?}");
    place.umount();
}

#[test]
fn no_process_of_ours_mounts_an_overlay() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let trace = place.at("trace");
    let mut strace = Command::new("strace");
    strace.args(["-f", "--seccomp-bpf", "-e", "trace=mount,fsopen,fsconfig,fsmount,move_mount", "-o"]);
    let vmctr = rig.vmctr_command();
    strace.arg(&trace).arg(vmctr.get_program()).args(vmctr.get_args());
    strace.args(["union", "mount", "-o", &place.options()]).arg(place.at("mnt"));
    strace.envs(vmctr.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let traced = Running::start(strace.stdin(Stdio::null()));
    // It ends with the last process that it follows.
    eventually("it is mounted", PATIENCE, || place.list().iter().any(|union| union["state"] == "mounted"));
    fs::write(place.at("mnt/new"), "new\n").expect("writable");
    place.umount();
    traced.finish().ok();
    let calls = place.text("trace");
    assert!(calls.contains("fsopen(\"fuse\"") && calls.contains("mount("), "{calls}");
    assert!(!calls.contains("\"overlay\""), "{calls}");
}

#[test]
fn with_nopassthrough_all_bytes_come_through_the_vm() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let bytes: Vec<u8> = (0..4 << 20).map(|at: u32| (at / 4096) as u8).collect();
    fs::write(place.at("base/large"), &bytes).expect("writable");
    for (option, on_host) in [("", true), (",nopassthrough", false)] {
        place.try_mount(&format!("{}{option}", place.options()), "mnt").ok();
        assert!(fs::read(place.at("mnt/large")).expect("readable") == bytes);
        let relay = || {
            place.vmctr(&["inspect", "--json", &place.at("mnt").to_string_lossy()]).ok().json()["relay"]
                .clone()
        };
        eventually("the reading is counted", PATIENCE, || relay()["turns"].as_u64() > Some(0));
        assert_eq!(relay()["host_reads"].as_u64() > Some(0), on_host, "{option}: {}", relay());
        place.umount();
    }
}

#[test]
fn a_tree_of_more_files_than_may_be_open_is_found_and_read() {
    const LIMIT: u64 = 2500;
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.shell("for d in $(seq 30); do mkdir -p base/many/$d; for f in $(seq 100); do echo $d > base/many/$d/$f; done; done").ok();
    let vmctr = rig.vmctr_command();
    let mut limited = Command::new("sh");
    limited.args(["-c", &format!("ulimit -n {LIMIT}; exec \"$@\""), "sh"]).arg(vmctr.get_program());
    limited.args(vmctr.get_args()).args(["union", "mount", "-o", &place.options()]).arg(place.at("mnt"));
    limited.envs(vmctr.get_envs().filter_map(|(name, value)| Some((name, value?))));
    run(&mut limited).ok();
    for _ in 0..2 {
        place
            .shell("find mnt/many -type f | wc -l; cat mnt/many/*/* | sort -u | wc -l")
            .ok()
            .prints("3000\n30");
    }
    place.umount();
}
