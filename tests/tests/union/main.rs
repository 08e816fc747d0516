//! Union mounts by a helper VM, as a user sees them.

mod ends;
mod place;
mod refusals;

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::process::{Command, Stdio};
use std::time::Duration;

use place::Place;
use vmctr_tests::rig::command::{Running, eventually, run};
use vmctr_tests::rig::{Rig, prerequisites, proc};

const PATIENCE: Duration = Duration::from_secs(60);

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
fn mount_8_and_fstab_mount_a_union() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let bin = rig.new_folder("bin");
    symlink(prerequisites::binary("vmctr"), bin.join("mount.fuse.vmctr")).expect("writable");
    // mount(8) looks for its helpers in /sbin: there, for this one process and its children only.
    let fstab = format!(
        "vmctr {} fuse.vmctr {},noauto,nofail,users,_netdev,async,nogroup 0 0\n",
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
fn four_hundred_lower_folders_are_one_at_the_usual_limit_of_open_files() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place
        .shell(
            "for i in $(seq 400); do mkdir -p many/$i/of; echo $i | tee many/$i/of/$i > many/$i/common; done",
        )
        .ok();
    let lowers: Vec<_> =
        (1..=400).map(|number| place.at(&format!("many/{number}")).display().to_string()).collect();
    place.mount_after("ulimit -Sn 1024", &format!("lowerdir={}", lowers.join(":"))).ok();
    place
        .shell("cat mnt/common; ls mnt/of | wc -l; cat mnt/of/* | sort -u | wc -l")
        .ok()
        .prints("1\n400\n400");
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
    place.mount_after(&format!("ulimit -n {LIMIT}"), &place.options()).ok();
    for _ in 0..2 {
        place
            .shell("find mnt/many -type f | wc -l; cat mnt/many/*/* | sort -u | wc -l")
            .ok()
            .prints("3000\n30");
    }
    place.umount();
}
