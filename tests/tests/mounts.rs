//! Folders and files: the image, the changes to it, and what is mounted from the host.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::eventually;
use vmctr_tests::rig::image::{MARKER, tree_digest};
use vmctr_tests::under_both_runtimes;

under_both_runtimes! {
    a_folder_of_the_host_can_be_read_and_written,
    a_read_only_folder_cannot_be_written,
    a_single_file_of_the_host_can_be_mounted,
    a_file_can_be_mounted_where_the_image_has_a_link_to_nowhere,
    changes_on_the_host_are_seen_at_once,
    owners_modes_links_and_times_are_kept,
    many_folders_can_be_mounted,
    a_folder_can_be_the_root,
    the_native_snapshotter_works,
    changes_lie_in_containerds_snapshot,
}

fn a_folder_of_the_host_can_be_read_and_written(rig: &mut Rig) {
    let folder = rig.new_folder("data");
    fs::create_dir(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/in"), "from the host\n").unwrap();
    let script =
        "cat /data/sub/in; echo from the container > /data/sub/out; rm /data/sub/in; mkdir /data/new";
    rig.container("rw").bind(&folder, "/data", "rbind:rw").sh(script).output().ok().prints("from the host");
    assert_eq!(fs::read_to_string(folder.join("sub/out")).unwrap(), "from the container\n");
    assert!(!folder.join("sub/in").exists() && folder.join("new").is_dir());
}

fn a_read_only_folder_cannot_be_written(rig: &mut Rig) {
    let folder = rig.new_folder("data");
    fs::write(folder.join("in"), "kept\n").unwrap();
    let before = tree_digest(&folder);
    let script = "cat /data/in; echo x 2>/dev/null > /data/in || echo refused; touch /data/f 2>/dev/null || echo refused; \
                  rm /data/in 2>/dev/null || echo refused; chmod 777 /data/in 2>/dev/null || echo refused";
    let output = rig.container("ro").bind(&folder, "/data", "rbind:ro").sh(script).output();
    output.ok().prints("kept\nrefused\nrefused\nrefused\nrefused");
    assert_eq!(tree_digest(&folder), before);
}

fn a_single_file_of_the_host_can_be_mounted(rig: &mut Rig) {
    let folder = rig.new_folder("data");
    for name in ["ro", "rw", "neighbour"] {
        fs::write(folder.join(name), format!("{name}\n")).unwrap();
    }
    let script = "cat /etc/ro /rw; echo x 2>/dev/null > /etc/ro || echo refused; echo changed > /rw";
    let run = rig.container("file").bind(&folder.join("ro"), "/etc/ro", "bind:ro");
    let output = run.bind(&folder.join("rw"), "/rw", "bind:rw").sh(script).output();
    output.ok().prints("ro\nrw\nrefused");
    assert_eq!(fs::read_to_string(folder.join("rw")).unwrap(), "changed\n");
    assert_eq!(fs::read_to_string(folder.join("ro")).unwrap(), "ro\n");
}

/// As images with systemd have it for /etc/resolv.conf.
fn a_file_can_be_mounted_where_the_image_has_a_link_to_nowhere(rig: &mut Rig) {
    let root = rig.busybox_root("link", &[]);
    std::os::unix::fs::symlink("../run/systemd/resolve/stub", root.join("etc/resolv.conf")).unwrap();
    let file = rig.new_folder("data").join("resolv.conf");
    fs::write(&file, "nameserver 192.0.2.1\n").unwrap();
    let run = rig.container_in(&root, "link").bind(&file, "/etc/resolv.conf", "bind:ro");
    run.sh("cat /etc/resolv.conf; readlink /etc/resolv.conf")
        .output()
        .ok()
        .prints("nameserver 192.0.2.1\n../run/systemd/resolve/stub");
}

fn changes_on_the_host_are_seen_at_once(rig: &mut Rig) {
    let folder = rig.new_folder("data");
    let file = folder.join("f");
    fs::write(&file, "one").unwrap();
    let container =
        rig.container("see").bind(&folder, "/data", "rbind:ro").args(["/bin/sleep", "3600"]).detached();
    container.sh("cat /data/f; ls /data").ok().prints("onef");
    fs::write(&file, "two, and longer").unwrap();
    container.sh("cat /data/f").ok().prints("two, and longer");
    fs::write(folder.join("g"), "new").unwrap();
    container.sh("cat /data/g; ls /data").ok().prints("newf\ng");
    fs::remove_file(&file).unwrap();
    container.sh("ls /data; test ! -e /data/f").ok().prints("g");
    fs::rename(folder.join("g"), folder.join("h")).unwrap();
    container.sh("ls /data").ok().prints("h");
    container.remove();
}

fn owners_modes_links_and_times_are_kept(rig: &mut Rig) {
    let folder = rig.new_folder("data");
    fs::write(folder.join("f"), "x").unwrap();
    std::os::unix::fs::chown(folder.join("f"), Some(1000), Some(2000)).unwrap();
    fs::set_permissions(folder.join("f"), fs::Permissions::from_mode(0o4751)).unwrap();
    let script = "stat -c '%a %u %g %h' /data/f; cd /data; ln f hard; ln -s f soft; mkfifo pipe; \
                  cp f copy; chown 7:8 copy; chmod 640 copy; touch -d '2001-02-03 04:05:06' copy; readlink soft; stat -c %h f";
    let output = rig.container("meta").bind(&folder, "/data", "rbind:rw").sh(script).output();
    output.ok().prints("4751 1000 2000 1\nf\n2");
    let copy = fs::metadata(folder.join("copy")).unwrap();
    assert_eq!((copy.mode() & 0o7777, copy.uid(), copy.gid(), copy.mtime()), (0o640, 7, 8, 981_173_106));
    assert_eq!(
        fs::metadata(folder.join("hard")).unwrap().ino(),
        fs::metadata(folder.join("f")).unwrap().ino()
    );
    assert_eq!(fs::read_link(folder.join("soft")).unwrap(), Path::new("f"));
}

fn many_folders_can_be_mounted(rig: &mut Rig) {
    let mut run = rig.container("many");
    for number in 0..20 {
        let folder = rig.new_folder(&format!("m{number}"));
        fs::write(folder.join("n"), format!("{number} ")).unwrap();
        run = run.bind(&folder, &format!("/m/{number}"), "rbind:ro");
    }
    let numbers: Vec<_> = (0..20).map(|number| number.to_string()).collect();
    let script = format!("for i in {}; do cat /m/$i/n; done; echo", numbers.join(" "));
    run.sh(&script).output().ok().prints(&format!("{} ", numbers.join(" ")));
}

fn a_folder_can_be_the_root(rig: &mut Rig) {
    let root = rig.busybox_root("root", &[]);
    let script = format!("cat /{}; echo changed > /{}", MARKER.0, MARKER.0);
    rig.container_in(&root, "folder").sh(&script).output().ok().prints(MARKER.1);
    assert_eq!(fs::read_to_string(root.join(MARKER.0)).unwrap(), "changed\n");
}

fn the_native_snapshotter_works(rig: &mut Rig) {
    let script = format!("cat /{}; echo x > /new; cat /new", MARKER.0);
    let run = rig.container("native").flag("--snapshotter", "native").sh(&script);
    run.output().ok().prints(&format!("{}\nx", MARKER.1));
}

fn changes_lie_in_containerds_snapshot(rig: &mut Rig) {
    let script = "echo changed > /etc/marker; rm -r /home; mkdir /var/new; echo x > /var/new/f; touch /ready; sleep 3600";
    let container = rig.container("changes").sh(script).detached();
    eventually("the changes are made", Duration::from_secs(30), || {
        container.sh("test -e /ready").code() == 0
    });
    let upper = upper_dir(rig, container.id());
    eventually("the changes are on the host", Duration::from_secs(10), || upper.join("ready").exists());
    assert_eq!(fs::read_to_string(upper.join("etc/marker")).unwrap(), "changed\n");
    assert_eq!(fs::read_to_string(upper.join("var/new/f")).unwrap(), "x\n");
    let whiteout = fs::symlink_metadata(upper.join("home")).unwrap();
    assert_eq!((whiteout.mode() & 0o170_000, whiteout.rdev()), (0o020_000, 0), "no whiteout");
    let usage = rig.ctr_run(&["snapshots", "usage", "-b", container.id()]).ok().text();
    let bytes = usage.lines().nth(1).and_then(|row| row.split_whitespace().nth(1)?.parse::<u64>().ok());
    assert!(bytes.is_some_and(|bytes| bytes > 0), "containerd sees no changes: {usage}");
    container.remove();
}

/// Where containerd's overlay snapshotter keeps the changes of a container.
fn upper_dir(rig: &Rig, id: &str) -> PathBuf {
    overlay_option(rig, id, "upperdir=")
}

fn overlay_option(rig: &Rig, id: &str, name: &str) -> PathBuf {
    let mounts = rig.ctr_run(&["snapshots", "mounts", "/mnt", id]).ok().text();
    let value = mounts.split([',', ' ', '\n']).find_map(|option| option.strip_prefix(name));
    PathBuf::from(value.unwrap_or_else(|| panic!("no {name} in {mounts}")))
}

#[test]
fn with_an_upper_folder_the_root_folder_stays_untouched() {
    let rig = Rig::vmctr();
    let root = rig.busybox_root("root", &[]);
    let (upper, before) = (rig.new_folder("upper"), tree_digest(&root));
    let script = "echo changed > /etc/marker; rm -r /home; mv /var /var2; cat /etc/marker";
    let run = rig.container_in(&root, "upper").annotation("io.vmctr.upper-dir", upper.display());
    run.sh(script).output().ok().prints("changed");
    assert_eq!(tree_digest(&root), before, "the root folder has changed");
    assert_eq!(fs::read_to_string(upper.join("etc/marker")).unwrap(), "changed\n");
    let again = rig.container_in(&root, "again").annotation("io.vmctr.upper-dir", upper.display());
    again.sh("cat /etc/marker; ls -d /home /var2 2>&1").output().exits(1);
}

#[test]
fn an_image_layer_stays_untouched_whatever_the_container_does() {
    let rig = Rig::vmctr();
    let lower = lower_dir(&rig);
    let before = tree_digest(&lower);
    let script = "echo x > /etc/marker; chmod 000 /etc/passwd; chown 5:5 /etc/group; rm -rf /bin/[a-r]* /home /tmp; \
                  ln /etc/marker /etc/hard; touch -d 2001-01-01 /etc; mv /var /moved";
    rig.container("vandal").sh(script).output().ok();
    assert_eq!(tree_digest(&lower), before, "the image has changed");
}

/// Where containerd's overlay snapshotter keeps the image's only layer.
fn lower_dir(rig: &Rig) -> PathBuf {
    let run = rig.container("look").args(["/bin/true"]);
    run.create().ok();
    let lower = overlay_option(rig, run.id(), "lowerdir=");
    rig.ctr_run(&["container", "delete", run.id()]).ok();
    lower
}

#[test]
fn an_upper_in_the_guest_leaves_nothing_on_the_host() {
    let rig = Rig::vmctr();
    let script = "echo changed > /etc/marker; dd if=/dev/zero of=/big bs=1M count=32 2>/dev/null; cat /etc/marker; \
                  touch /ready; sleep 3600";
    let run = rig.container("guest").annotation("io.vmctr.upper", "guest").sh(script);
    let container = run.detached();
    eventually("the changes are made", Duration::from_secs(60), || {
        container.sh("test -e /ready").code() == 0
    });
    let upper = upper_dir(&rig, container.id());
    assert_eq!(fs::read_dir(&upper).unwrap().count(), 0, "the host's upper folder is not empty");
    container.sh("cat /etc/marker; stat -c %s /big").ok().prints("changed\n33554432");
    container.remove();
}
