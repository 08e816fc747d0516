//! What a commit leaves in the stores: the same bytes for the same changes, and nothing half-made
//! wherever it is killed.

#![allow(clippy::unwrap_used)] // helpers of tests

mod rig;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rig::{LIMIT, differences, folder, layers, ops::fixed_time, show, stream, tree, write_layer};
use rustix::fs::{XattrFlags, lsetxattr};
use serde_json::Value;
use vmctr_images::commit::{Changes, Plan, Step, capture, to_archive, to_layout};
use vmctr_images::config::{Base, Build, Descriptor, Format};
use vmctr_images::digest::Digest;
use vmctr_images::layer::{Compression, LayerOptions, LayerReader};
use vmctr_images::path::TreePath;
use vmctr_images::store::Layout;
use vmctr_images::tree::{Form, NewFolderError, compare, fill_folder, write_new_folder};
use vmctr_images::upper::{Consistency, Namespace, Note, Scope, Status, Walk, diff};

const TIME: i64 = 1_500_000_000;

fn options(compression: Compression) -> LayerOptions {
    LayerOptions { compression, clamp: Some(TIME), limit: LIMIT }
}

fn build() -> Build {
    Build {
        instructions: vec!["CMD [\"sh\"]".parse().unwrap()],
        author: Some("somebody".into()),
        message: None,
        created: TIME,
        format: Format::Oci,
        squash: false,
    }
}

/// An upper with a bit of everything, and the lower below it.
fn example(dir: &tempfile::TempDir) -> [PathBuf; 2] {
    let [upper, lower] = ["upper", "lower"].map(|name| folder(dir, name));
    fs::create_dir_all(lower.join("gone/deeper")).unwrap();
    fs::create_dir_all(lower.join("replaced/old")).unwrap();
    fs::write(lower.join("same"), "same").unwrap();
    fs::write(upper.join("big"), (0..3_000_000u32).map(|n| ((n * n) >> 7) as u8).collect::<Vec<_>>())
        .unwrap();
    fs::write(upper.join("same"), "same").unwrap();
    for path in [lower.join("same"), upper.join("same")] {
        fs::File::open(path).unwrap().set_modified(fixed_time()).unwrap();
    }
    fs::create_dir(upper.join("replaced")).unwrap();
    lsetxattr(upper.join("replaced"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
    fs::write(upper.join("replaced/new"), "new").unwrap();
    mknod(&upper.join("gone"), SFlag::S_IFCHR, Mode::empty(), makedev(0, 0)).unwrap();
    fs::write(upper.join("first"), "link").unwrap();
    fs::hard_link(upper.join("first"), upper.join("second")).unwrap();
    [upper, lower]
}

#[test]
fn a_diff_tells_what_docker_would() {
    let dir = tempfile::tempdir().unwrap();
    let layers = layers(&example(&dir));
    let mut walk = Walk::new(&layers, Scope::Changes, Consistency::Frozen, TreePath::root()).unwrap();
    let mut lines = Vec::new();
    diff(&mut walk, &mut |status: Status, path| lines.push(format!("{status} {path}"))).unwrap();
    let expected = [
        "C /",
        "A /big",
        "A /first",
        "D /gone",
        "C /replaced",
        "D /replaced/old",
        "A /replaced/new",
        "A /second",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn an_attribute_that_a_folder_lost_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let folders = ["upper", "lower"].map(|name| folder(&dir, name));
    folders.iter().for_each(|path| fs::create_dir(path.join("d")).unwrap());
    lsetxattr(folders[1].join("d"), "user.a", b"1", XattrFlags::empty()).unwrap();
    let layers = layers(&folders);
    let mut walk = Walk::new(&layers, Scope::Changes, Consistency::Frozen, TreePath::root()).unwrap();
    while walk.next_change().unwrap().is_some() {}
    assert_eq!(walk.notes().kept, [Note::LostXattr(TreePath::parse(b"d").unwrap(), "user.a".into())]);
}

#[test]
fn a_subtree_alone() {
    let dir = tempfile::tempdir().unwrap();
    let layers = layers(&example(&dir));
    for (subtree, expected) in [
        ("replaced", vec!["C /", "C /replaced", "D /replaced/old", "A /replaced/new"]),
        ("gone", vec!["C /", "D /gone"]),
        ("gone/deeper", vec![]),
        ("same", vec![]),
    ] {
        let subtree = TreePath::parse(subtree.as_bytes()).unwrap();
        let mut walk = Walk::new(&layers, Scope::Changes, Consistency::Frozen, subtree).unwrap();
        let mut lines = Vec::new();
        diff(&mut walk, &mut |status: Status, path| lines.push(format!("{status} {path}"))).unwrap();
        assert_eq!(lines, expected);
    }
}

#[test]
fn equal_changes_give_equal_bytes_whatever_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let folders = example(&dir);
    // Copies have other inodes, times of folders above, and are made under another umask.
    let copies = ["copy-upper", "copy-lower"].map(|name| dir.path().join(name));
    for (from, to) in folders.iter().zip(&copies) {
        let script = "umask 077; exec cp --archive --preserve=all \"$0\" \"$1\"";
        assert!(Command::new("sh").args(["-c", script]).arg(from).arg(to).status().unwrap().success());
    }
    for compression in [Compression::None, Compression::Gzip(6), Compression::Zstd(3)] {
        let made: Vec<_> = [(&folders, 0o022), (&copies, 0o077)]
            .into_iter()
            .enumerate()
            .map(|(number, (folders, umask))| {
                nix::sys::stat::umask(Mode::from_bits_truncate(umask));
                let (layers, root) = (layers(folders), TreePath::root());
                let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
                let (base, build) = (Base::empty(), build());
                let plan =
                    Plan { changes, layer: options(compression), base: &base, build: &build, tag: Some("t") };
                let file = dir.path().join(format!("{number}-{compression}"));
                let made = to_archive(&plan, &file, &mut |_| Ok(None), &mut |_| Ok(())).unwrap();
                (made.image, Digest::of(&fs::read(file).unwrap()))
            })
            .collect();
        nix::sys::stat::umask(Mode::from_bits_truncate(0o022));
        assert_eq!(made[0], made[1], "{compression}");
    }
}

#[test]
fn no_time_is_later_than_the_clamp() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("layer");
    write_layer(&example(&dir), Scope::Changes, options(Compression::None), &file).unwrap();
    let mut reader = LayerReader::new(fs::File::open(file).unwrap(), LIMIT).unwrap();
    while let Some(item) = reader.next_item().unwrap() {
        assert!((item.meta.mtime.secs, item.meta.mtime.nanos) <= (TIME, 0), "{item:?}");
    }
}

#[test]
fn missing_base_layers_are_told_and_the_rest_works() {
    let dir = tempfile::tempdir().unwrap();
    let gone = Digest::of(b"gone");
    let base = Base::parse(
        format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["{gone}"]}}}}"#).as_bytes(),
        format!(r#"{{"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{gone}","size":4}}]}}"#)
            .as_bytes(),
    )
    .unwrap();
    let (layers, root, build) = (layers(&example(&dir)), TreePath::root(), build());
    let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
    let plan = Plan { changes, layer: options(Compression::None), base: &base, build: &build, tag: None };
    let file = dir.path().join("archive");
    let made = to_archive(&plan, &file, &mut |_| Ok(None), &mut |_| Ok(())).unwrap();
    assert_eq!(made.missing.iter().map(|layer| layer.digest).collect::<Vec<_>>(), [gone]);
    let present = &mut |layer: &Descriptor| {
        assert_eq!(layer.digest, gone);
        Ok(Some(Box::new(&b"gone"[..]) as Box<dyn Read>))
    };
    let made = to_layout(&plan, &dir.path().join("layout"), present, &mut |_| Ok(())).unwrap();
    assert_eq!(made.missing, []);
    assert!(Layout::open(&dir.path().join("layout")).unwrap().has(&gone));
}

#[test]
fn a_new_folder_is_never_written_over_another() {
    let dir = tempfile::tempdir().unwrap();
    let (layers, root, new) = (layers(&example(&dir)), TreePath::root(), dir.path().join("new"));
    let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
    capture(&changes, Consistency::Frozen, Namespace::Trusted, &new, &mut |_| Ok(())).unwrap();
    let mut walk = Walk::new(&layers, Scope::Changes, Consistency::Frozen, TreePath::root()).unwrap();
    let again = write_new_folder(&mut walk, &new, Namespace::Trusted, Consistency::Frozen, &mut |_| Ok(()));
    assert!(matches!(again, Err(NewFolderError::Exists(_))));
}

#[test]
fn what_is_called_off_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (layers, root, base, build) = (layers(&example(&dir)), TreePath::root(), Base::empty(), build());
    let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
    let out = folder(&dir, "out");
    let mut copied = 0;
    let copy = capture(&changes, Consistency::Frozen, Namespace::Trusted, &out.join("new"), &mut |step| {
        let Step::Copied(bytes) = step else { panic!("{step:?}") };
        copied = bytes;
        if bytes > 0 { Err(std::io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    });
    assert!(copy.is_err() && copied > 0);
    let plan = Plan { changes, layer: options(Compression::None), base: &base, build: &build, tag: None };
    let mut steps = 0;
    let archive = to_archive(&plan, &out.join("archive"), &mut |_| Ok(None), &mut |_| {
        steps += 1;
        Err(std::io::ErrorKind::Interrupted.into())
    });
    assert!(archive.is_err());
    assert_eq!(steps, 1);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
}

#[test]
fn a_path_that_no_snapshotter_can_name_is_refused_for_a_snapshot_only() {
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
    let dir = tempfile::tempdir().unwrap();
    let folders = example(&dir);
    let name = "d".repeat(250);
    let mut at = openat(CWD, &folders[0], OFlags::PATH, Mode::empty()).unwrap();
    for _ in 0..17 {
        mkdirat(&at, &name, Mode::RWXU).unwrap();
        at = openat(&at, &name, OFlags::PATH, Mode::empty()).unwrap();
    }
    let (layers, root) = (layers(&folders), TreePath::root());
    let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
    capture(&changes, Consistency::Frozen, Namespace::Trusted, &dir.path().join("new"), &mut |_| Ok(()))
        .unwrap();
    let snapshot = folder(&dir, "snapshot");
    let mut walk = Walk::new(&layers, Scope::Changes, Consistency::Frozen, TreePath::root()).unwrap();
    let form = Form::Overlay(Namespace::Trusted);
    let filled = fill_folder(&mut walk, &snapshot, form, Consistency::Frozen, &mut |_| Ok(()));
    assert!(matches!(filled, Err(NewFolderError::LongPath(path)) if path.as_bytes().len() > 4000));
}

#[test]
fn a_verification_finds_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let folders = example(&dir);
    let file = dir.path().join("everything");
    write_layer(&folders, Scope::Everything, LayerOptions::default(), &file).unwrap();
    let layers = layers(&folders);
    assert_eq!(compare(tree(&layers), stream(&file), 10).unwrap(), []);
    fs::write(folders[0].join("big"), "other").unwrap();
    fs::remove_file(folders[0].join("second")).unwrap();
    fs::write(folders[0].join("extra"), "").unwrap();
    let found: Vec<_> = compare(tree(&layers), stream(&file), 10).unwrap();
    let paths: Vec<_> = found.iter().map(|difference| difference.path.to_string()).collect();
    assert_eq!(paths, ["/", "/big", "/extra", "/second"], "{}", show(&found));
}

/// GNU tar and the guest's archive say a file's attributes with its first name only.
#[test]
fn a_verification_asks_for_attributes_once_for_all_names_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("lower");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a"), "content").unwrap();
    lsetxattr(folder.join("a"), "user.a", b"1", XattrFlags::empty()).unwrap();
    fs::hard_link(folder.join("a"), folder.join("b")).unwrap();
    let file = dir.path().join("everything");
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=posix", "--sort=name", "--xattrs", "--numeric-owner"]);
    tar.arg("--file").arg(&file).arg("--directory").arg(&folder).arg(".");
    assert!(tar.status().unwrap().success());
    let layers = layers(std::slice::from_ref(&folder));
    assert_eq!(compare(tree(&layers), stream(&file), 10).unwrap(), []);
    lsetxattr(folder.join("b"), "user.a", b"2", XattrFlags::empty()).unwrap();
    let found = compare(tree(&layers), stream(&file), 10).unwrap();
    assert_eq!(show(&found), "  /a: attributes differ: user.a\n");
}

/// Ours, GNU tar and the `tar` crate read the same names, kinds, sizes and contents.
#[test]
fn parsers_agree_on_what_we_write() {
    let dir = tempfile::tempdir().unwrap();
    let [upper, lower] = example(&dir);
    fs::write(upper.join("n".repeat(180)), "long name").unwrap();
    fs::create_dir_all(upper.join("d".repeat(120)).join("e".repeat(120))).unwrap();
    std::os::unix::fs::symlink("t".repeat(300), upper.join("long-target")).unwrap();
    let file = dir.path().join("layer");
    write_layer(&[upper, lower], Scope::Changes, options(Compression::None), &file).unwrap();

    let mut ours = Vec::new();
    let mut reader = LayerReader::new(fs::File::open(&file).unwrap(), LIMIT).unwrap();
    while reader.next_item().unwrap().is_some() {
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        ours.push(Digest::of(&content));
    }
    let (mut crates, mut names) = (Vec::new(), Vec::new());
    for entry in tar::Archive::new(fs::File::open(&file).unwrap()).entries().unwrap() {
        let mut entry = entry.unwrap();
        names.push(String::from_utf8(entry.path_bytes().into_owned()).unwrap());
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        crates.push(Digest::of(&content));
    }
    assert_eq!(ours, crates);
    let listed = Command::new("tar").args(["--quoting-style=literal", "-tf"]).arg(&file).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stderr), "");
    assert_eq!(String::from_utf8(listed.stdout).unwrap().lines().collect::<Vec<_>>(), names);
}

/// What shows of a commit that was killed: no image, or the whole one.
fn check_layout(path: &Path) -> bool {
    for blob in fs::read_dir(path.join("blobs/sha256")).into_iter().flatten() {
        let blob = blob.unwrap();
        let digest = Digest::of(&fs::read(blob.path()).unwrap());
        assert_eq!(blob.file_name().to_str().unwrap(), digest.hex(), "a half blob");
    }
    let Ok(index) = fs::read(path.join("index.json")) else { return false };
    let index: Value = serde_json::from_slice(&index).unwrap();
    let layout = Layout::open(path).unwrap();
    let manifest = layout.find(Some("t")).unwrap().unwrap();
    let manifest: Value = serde_json::from_reader(layout.blob(&manifest.digest).unwrap()).unwrap();
    let layers = manifest["layers"].as_array().unwrap().iter();
    for descriptor in layers.chain([&manifest["config"]]) {
        let digest: Digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
        assert!(layout.has(&digest), "an image without its blobs");
    }
    !index["manifests"].as_array().unwrap().is_empty()
}

/// Runs this test program's own child case under strace, which kills it at its `number`th call of
/// `call`; whether it got to its end.
fn killed_at(call: &str, number: u32, dir: &Path) -> bool {
    let status = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}")])
        .args(["-e", &format!("inject={call}:signal=KILL:when={number}")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child_commits", "--ignored", "--test-threads=1"])
        .env("VMCTR_TEST_DIR", dir)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    status.success()
}

/// Not a test of its own: what [`killed_at`] kills.
#[test]
#[ignore = "run by `a_commit_killed_anywhere_leaves_nothing_half_made`"]
fn child_commits() {
    let Some(dir) = std::env::var_os("VMCTR_TEST_DIR").map(PathBuf::from) else { return };
    let (layers, root, base, build) =
        (layers(&[dir.join("upper"), dir.join("lower")]), TreePath::root(), Base::empty(), build());
    let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
    let plan =
        Plan { changes, layer: options(Compression::Zstd(1)), base: &base, build: &build, tag: Some("t") };
    let out = dir.join("out");
    capture(&changes, Consistency::Frozen, Namespace::Trusted, &out.join("new"), &mut |_| Ok(())).unwrap();
    to_layout(&plan, &out.join("layout"), &mut |_| Ok(None), &mut |_| Ok(())).unwrap();
    to_archive(&plan, &out.join("archive"), &mut |_| Ok(None), &mut |_| Ok(())).unwrap();
}

#[test]
fn a_commit_killed_anywhere_leaves_nothing_half_made() {
    let dir = tempfile::tempdir().unwrap();
    let folders = example(&dir);
    let whole = folder(&dir, "whole");
    let reference = {
        let layers = layers(&folders);
        let root = TreePath::root();
        let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
        capture(&changes, Consistency::Frozen, Namespace::Trusted, &whole.join("new"), &mut |_| Ok(()))
            .unwrap();
        whole.join("new")
    };
    let mut archive = None;
    // Everything by which a commit changes the disk.
    for call in [
        "write",
        "copy_file_range",
        "mkdir,mkdirat,mknodat",
        "linkat,rename,renameat2",
        "fsync,syncfs",
        "openat,openat2",
    ] {
        let step = if call.starts_with("openat") { 23 } else { 1 };
        let (mut finished, mut killed) = (false, 0);
        for number in (1..).step_by(step) {
            let out = folder(&dir, "out");
            finished = killed_at(call, number, dir.path());
            check_layout(&out.join("layout"));
            if out.join("new").exists() {
                let found = differences(&out.join("new"), &reference);
                assert!(found.is_empty(), "{call} {number}:\n{}", show(&found));
            }
            if let Ok(bytes) = fs::read(out.join("archive")) {
                let digest = Digest::of(&bytes);
                assert_eq!(*archive.get_or_insert(digest), digest, "{call} {number}: half an archive");
            }
            // What is left does not hinder the next commit.
            for path in [out.join("new"), out.join("archive")] {
                let _ = fs::remove_dir_all(&path);
                let _ = fs::remove_file(&path);
            }
            if finished {
                break;
            }
            killed += 1;
        }
        assert!(finished, "{call}");
        println!("{call}: killed {killed} times");
        assert!(killed > 0, "{call} is never called");
        let left: Vec<_> =
            fs::read_dir(dir.path().join("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["layout"], "after {call}");
        fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
}

#[test]
fn a_full_disk_leaves_nothing() {
    rig::private_mounts();
    let dir = tempfile::tempdir().unwrap();
    let (layers, root, base, build) = (layers(&example(&dir)), TreePath::root(), Base::empty(), build());
    let small = folder(&dir, "small");
    nix::mount::mount(Some("tmpfs"), &small, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=1m"))
        .unwrap();
    let changes = Changes { layers: &layers, scope: Scope::Changes, subtree: &root };
    let plan = Plan { changes, layer: options(Compression::None), base: &base, build: &build, tag: None };
    assert!(to_layout(&plan, &small.join("layout"), &mut |_| Ok(None), &mut |_| Ok(())).is_err());
    assert!(to_archive(&plan, &small.join("archive"), &mut |_| Ok(None), &mut |_| Ok(())).is_err());
    assert!(
        capture(&changes, Consistency::Frozen, Namespace::Trusted, &small.join("new"), &mut |_| Ok(()))
            .is_err()
    );
    assert_eq!(fs::read_dir(small.join("layout/blobs/sha256")).unwrap().count(), 0);
    let left: Vec<_> = fs::read_dir(&small).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["layout"]);
    // A child of another test may hold its files for a moment.
    nix::mount::umount2(&small, nix::mount::MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_stored_layer_that_was_exchanged_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let stack = example(&dir);
    let (file, scratch) = (dir.path().join("layer"), dir.path().join("scratch"));
    let info = rig::write_layer(&stack, Scope::Changes, options(Compression::Gzip(1)), &file).unwrap();
    let check = || {
        std::fs::create_dir(&scratch).unwrap();
        let whole =
            vmctr_images::verify::unpack(std::fs::File::open(&file).unwrap(), &info, &scratch).unwrap();
        let folders = [scratch.clone(), stack[1].clone()];
        let layers = rig::layers(&stack);
        let live = vmctr_images::verify::Live::Folders(&layers);
        let found = vmctr_images::verify::differences(
            &folders,
            live,
            options(Compression::None).clamp,
            &TreePath::root(),
        )
        .unwrap();
        std::fs::remove_dir_all(&scratch).unwrap();
        (whole, found.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    assert_eq!(check(), (true, vec![]));
    let other = rig::folder(&dir, "other");
    std::fs::write(other.join("unexpected"), "x").unwrap();
    rig::write_layer(&[other, stack[1].clone()], Scope::Changes, options(Compression::Gzip(1)), &file)
        .unwrap();
    let (whole, found) = check();
    assert!(!whole);
    assert!(found.contains(&"/unexpected: should not be there".to_owned()), "{found:?}");
}
