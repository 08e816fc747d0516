//! How a union ends: taken away, or because something was killed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmctr_tests::rig::command::{Running, eventually, run};
use vmctr_tests::rig::vm::signal;
use vmctr_tests::rig::{Rig, proc};

use super::PATIENCE;
use super::place::Place;

/// How soon a union whose VM is gone must say so.
const SOON: Duration = Duration::from_secs(2);

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
    let device = Path::new(place.list()[0]["log"].as_str().expect("a path")).with_file_name("device");
    let is_gone = || fs::read_to_string(&device).is_ok_and(|device| device == "gone");
    eventually("its number is not taken for it any more", PATIENCE, is_gone);
    signal(fsd, Signal::SIGKILL);
    eventually("the process ends", PATIENCE, || place.list()[0]["state"] == "dead");
    let left = place.list();
    assert!(left[0]["lost"].as_str().is_some_and(|why| why.contains("may be lost")), "{left:?}");
    let again = place.try_mount(&place.options(), "mnt");
    assert!(again.code() == 125 && again.errors().contains("may be lost"), "{again}");
    assert_eq!(place.list(), left);
    place.umount();
}

#[test]
fn what_its_caller_has_open_does_not_stay_open_with_a_union() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount_after("exec 9> lock; flock 9", &place.options()).ok();
    place.shell("flock -n lock echo free").ok().prints("free");
    place.umount();
}

#[test]
fn what_lies_over_a_union_is_not_taken_away_for_it() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    place.shell("mount -t tmpfs over mnt").ok();
    let mnt = place.at("mnt").display().to_string();
    place.vmctr(&["umount", &mnt]).exits(125).fails_naming(&["over, of type tmpfs"]);
    assert_eq!(place.list()[0]["state"], "mounted");
    place.shell("umount mnt").ok();
    assert_eq!(place.text("mnt/shared"), "top\n");
    place.umount();
}

#[test]
fn whoever_still_uses_a_union_is_named() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    rig.new_folder("bound");
    place.mount();
    place.shell("mount --bind mnt bound").ok();
    let (mnt, bound) = (place.at("mnt").display().to_string(), place.at("bound").display().to_string());
    place.vmctr(&["umount", &mnt]).exits(125).fails_naming(&[&bound]);
    place.shell("umount bound").ok();
    eventually("the union is gone", PATIENCE, || place.list().is_empty());

    place.mount();
    let file = File::open(place.at("mnt/shared")).expect("readable");
    place.vmctr(&["umount", "-l", &mnt]).ok();
    place.try_mount(&place.options(), "mnt").exits(125).fails_naming(&["unmounted, but still used"]);
    let this = format!("process {} has a file or folder of it open", std::process::id());
    place.vmctr(&["umount", &mnt]).exits(125).fails_naming(&[&this]);
    drop(file);
    eventually("the union is gone", PATIENCE, || place.list().is_empty());
}

#[test]
fn another_mount_namespace_that_keeps_a_union_is_named() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    place.mount();
    let mut other = Command::new("unshare");
    let other =
        Running::start(other.args(["-m", "--propagation", "private", "sleep", "100"]).stdin(Stdio::null()));
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).expect("it runs");
    let apart = || namespace(other.pid()) != namespace(std::process::id());
    eventually("it has mounts of its own", PATIENCE, apart);
    let mnt = place.at("mnt").display().to_string();
    let process = format!("process {} has it mounted on {mnt}", other.pid());
    place.vmctr(&["umount", &mnt]).exits(125).fails_naming(&[&process]);
    drop(other);
    eventually("the union is gone", PATIENCE, || place.list().is_empty());
}
