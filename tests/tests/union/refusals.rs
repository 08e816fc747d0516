//! What is not mounted, and why.

use std::os::unix::fs::symlink;
use std::process::Command;

use vmctr_tests::rig::command::run;
use vmctr_tests::rig::{Rig, prerequisites};

use super::place::Place;

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
fn mount_8_is_told_in_its_own_codes() {
    let rig = Rig::vmctr();
    let place = Place::new(&rig);
    let helper = rig.new_folder("bin").join("mount.fuse.vmctr");
    symlink(prerequisites::binary("vmctr"), &helper).expect("writable");
    let (base, mnt) = (place.at("base").display().to_string(), place.at("mnt").display().to_string());
    let mount = |args: &[&str]| {
        let mut mount = Command::new(&helper);
        mount.envs(rig.vmctr_command().get_envs().filter_map(|(name, value)| Some((name, value?))));
        run(mount.args(["vmctr", &mnt]).args(args))
    };
    mount(&["-o", &format!("rw,suid,async,nogroup,lowerdir={base}")]).ok();
    mount(&["-o", "rw,relatime,user_id=0,remount,ro"]).exits(1).fails_naming(&["cannot be remounted"]);
    mount(&["-o", &format!("lowerdir={base}")]).exits(32).fails_naming(&["is mounted on"]);
    place.umount();
    mount(&["-o", &format!("lowerdir={base}"), "-N", "/proc/1/ns/mnt"]).exits(1).fails_naming(&["nsenter"]);
    mount(&["-o", &format!("lowerdir={base},sync")]).exits(1).fails_naming(&["sync is not possible"]);
    mount(&["-o", &format!("lowerdir={base}/none")]).exits(32).fails_naming(&["Cannot use the lower folder"]);
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
