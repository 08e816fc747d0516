//! A guest that makes its upper as awkward as it can, and layers made by nobody's friend.

#![allow(clippy::unwrap_used)] // helpers of tests

mod rig;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rig::{LIMIT, apply_layer, differences, folder, layers, show, walk, write_layer};
use rustix::fs::{XattrFlags, lsetxattr};
use vmctr_images::commit::{Changes, capture};
use vmctr_images::layer::{Compression, LayerError, LayerOptions, LayerReader, LayerWriter, ReadError};
use vmctr_images::path::TreePath;
use vmctr_images::tree::{ApplyError, Form, TreeError, apply};
use vmctr_images::upper::{Consistency, EntryKind, Namespace, Note, Scope, Walk, WalkError, What};

const PLAIN: LayerOptions = LayerOptions { compression: Compression::None, clamp: None, limit: LIMIT };

fn refused(folders: &[std::path::PathBuf]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let error = write_layer(folders, Scope::Changes, PLAIN, &dir.path().join("layer")).unwrap_err();
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// Writes, applies and compares what is in `upper`.
fn round_trip(dir: &tempfile::TempDir, upper: &Path) {
    let (file, plain) = (dir.path().join("layer"), folder(dir, "plain"));
    let info = write_layer(&[upper.to_owned()], Scope::Changes, PLAIN, &file).unwrap();
    apply_layer(&file, &info, &plain);
    let found = differences(&plain, upper);
    assert!(found.is_empty(), "{}", show(&found));
}

#[test]
fn links_to_the_host_are_recorded_and_never_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (upper, secret) = (folder(&dir, "upper"), dir.path().join("secret"));
    fs::write(&secret, "the host's secret").unwrap();
    symlink(&secret, upper.join("absolute")).unwrap();
    symlink("../secret", upper.join("upwards")).unwrap();
    symlink(dir.path(), upper.join("folder")).unwrap();
    let file = dir.path().join("layer");
    write_layer(&[upper], Scope::Changes, PLAIN, &file).unwrap();
    let bytes = fs::read(&file).unwrap();
    assert!(!bytes.windows(17).any(|window| window == b"the host's secret"));
}

#[test]
fn special_files_are_recorded_and_never_opened() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    // Opening any of these would block, fail or have effects.
    mknod(&upper.join("fifo"), SFlag::S_IFIFO, Mode::S_IRUSR, 0).unwrap();
    mknod(&upper.join("tape"), SFlag::S_IFCHR, Mode::S_IRUSR, makedev(9, 3)).unwrap();
    mknod(&upper.join("disk"), SFlag::S_IFBLK, Mode::S_IRUSR, makedev(4095, 1_048_575)).unwrap();
    drop(std::os::unix::net::UnixListener::bind(upper.join("socket")).unwrap());
    let layers = layers(&[upper]);
    let mut walk = walk(&layers, Scope::Changes);
    let mut names = Vec::new();
    while let Some(change) = walk.next_change().unwrap() {
        names.push(change.path.to_string());
    }
    assert_eq!(names, ["/", "/disk", "/fifo", "/tape"]);
    assert_eq!(walk.notes().kept, [Note::Socket(TreePath::parse(b"socket").unwrap())]);
}

#[test]
fn a_socket_in_place_of_a_file_still_deletes_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (upper, lower) = (folder(&dir, "upper"), folder(&dir, "lower"));
    fs::write(lower.join("x"), "").unwrap();
    drop(std::os::unix::net::UnixListener::bind(upper.join("x")).unwrap());
    let layers = layers(&[upper, lower]);
    let mut walk = walk(&layers, Scope::Changes);
    let mut whiteouts = 0;
    while let Some(change) = walk.next_change().unwrap() {
        whiteouts += u32::from(matches!(change.what, What::Whiteout));
    }
    assert_eq!(whiteouts, 1);
}

#[test]
fn names_of_any_bytes_and_lengths_survive() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    for name in [&[b'x'; 255][..], b"new\nline", b"\xff\xfe\x01", b" ", b"-rf", b"\\", b"= 12 path=x"] {
        fs::write(upper.join(OsStr::from_bytes(name)), name).unwrap();
    }
    for length in [98, 99, 100, 101, 155, 254] {
        fs::write(upper.join("y".repeat(length)), "").unwrap();
        symlink("t".repeat(length), upper.join(format!("link{length}"))).unwrap();
        fs::create_dir(upper.join("z".repeat(length))).unwrap();
    }
    symlink("t".repeat(4095), upper.join("longest")).unwrap();
    round_trip(&dir, &upper);
}

#[test]
fn paths_longer_than_the_kernel_takes_survive() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    let name = "n".repeat(200);
    let mut here = rustix::fs::open(&upper, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    for _ in 0..40 {
        rustix::fs::mkdirat(&here, &name, rustix::fs::Mode::RWXU).unwrap();
        here = rustix::fs::openat(&here, &name, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let mut file: fs::File = rustix::fs::openat(&here, "deep", flags, rustix::fs::Mode::RUSR).unwrap().into();
    file.write_all(b"at 8 KiB").unwrap();
    drop(file);
    let mut handle = here;
    for name in ["link", "link2"] {
        rustix::fs::linkat(&handle, "deep", &handle, name, rustix::fs::AtFlags::empty()).unwrap();
    }
    round_trip(&dir, &upper);
    handle = rustix::fs::open(&upper, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    drop(handle);
}

#[test]
fn endless_nesting_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    let mut here = rustix::fs::open(&upper, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    for _ in 0..4200 {
        rustix::fs::mkdirat(&here, "d", rustix::fs::Mode::RWXU).unwrap();
        here = rustix::fs::openat(&here, "d", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    }
    let text = refused(std::slice::from_ref(&upper));
    assert!(text.contains("nested deeper than 4096"), "{}", &text[text.len().saturating_sub(200)..]);
}

#[test]
fn many_files_in_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    (0..100_000).for_each(|n| drop(fs::File::create(upper.join(format!("file-{n}"))).unwrap()));
    let info = write_layer(&[upper], Scope::Changes, PLAIN, &dir.path().join("layer")).unwrap();
    assert_eq!(info.totals.entries, 100_001);
}

#[test]
fn what_a_layer_cannot_say_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (number, (name, xattr, expected)) in [
        (".wh.x", None, "/.wh.x has a name that begins with `.wh.`"),
        ("f", Some("trusted.overlay.overlay.opaque"), "/f has the attribute trusted.overlay.opaque"),
        ("f", Some("user.a=b"), "/f has the attribute user.a=b"),
        ("f", Some("trusted.overlay.metacopy"), "content in a lower layer that is missing"),
    ]
    .into_iter()
    .enumerate()
    {
        let upper = folder(&dir, &number.to_string());
        fs::write(upper.join(name), "").unwrap();
        if let Some(xattr) = xattr {
            lsetxattr(upper.join(name), xattr, b"y", XattrFlags::empty()).unwrap();
        }
        let text = refused(&[upper]);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn attributes_of_all_sizes_survive_and_empty_ones_are_noted() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    for length in [0, 1, 87, 88, 89, 3000] {
        let path = upper.join(length.to_string());
        fs::write(&path, "").unwrap();
        lsetxattr(&path, "user.a", &vec![b'\n'; length], XattrFlags::empty()).unwrap();
    }
    round_trip(&dir, &upper);
    let layers = layers(&[upper]);
    let mut walk = walk(&layers, Scope::Changes);
    while walk.next_change().unwrap().is_some() {}
    let expected = Note::EmptyXattr(TreePath::parse(b"0").unwrap(), "user.a".into());
    assert_eq!(walk.notes().kept, [expected]);
}

#[test]
fn redirects_that_lead_out_or_in_circles() {
    let dir = tempfile::tempdir().unwrap();
    for (redirect, fine) in
        [("../x", false), ("/../etc", false), ("a/b", false), ("", false), ("/nowhere", true), ("/d/d", true)]
    {
        let (upper, lower) = (tempfile::tempdir_in(dir.path()).unwrap(), folder(&dir, "lower"));
        fs::create_dir(upper.path().join("d")).unwrap();
        lsetxattr(
            upper.path().join("d"),
            "trusted.overlay.redirect",
            redirect.as_bytes(),
            XattrFlags::empty(),
        )
        .unwrap();
        let result =
            write_layer(&[upper.path().to_owned(), lower], Scope::Changes, PLAIN, &dir.path().join("layer"));
        assert_eq!(result.is_ok(), fine, "{redirect}: {result:?}");
    }
}

#[test]
fn a_sparse_file_of_any_claimed_size_meets_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    fs::File::create(upper.join("huge")).unwrap().set_len(1 << 43).unwrap();
    let text = refused(&[upper]);
    assert!(text.contains("beyond") && text.contains("/huge"), "{text}");
}

#[test]
fn owners_beyond_the_old_limits_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    fs::File::create(upper.join("sparse")).unwrap().set_len((100 << 20) + 1).unwrap();
    std::os::unix::fs::chown(upper.join("sparse"), Some(4_000_000_000), Some(3_000_000)).unwrap();
    round_trip(&dir, &upper);
}

/// Somebody exchanges folders for links and files for devices as fast as they can.
#[test]
fn names_that_change_their_meaning_lead_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (upper, outside) = (folder(&dir, "upper"), folder(&dir, "outside"));
    fs::write(outside.join("secret"), "the host's secret").unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let swapper = {
        let (stop, upper, outside) = (Arc::clone(&stop), upper.clone(), outside.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let (real, name) = (upper.join("real"), upper.join("name"));
                let _ = fs::create_dir(&real);
                let _ = fs::write(real.join("secret"), "the guest's own");
                let _ = fs::rename(&real, &name);
                let _ = fs::remove_dir_all(&name);
                let _ = symlink(&outside, &name);
                let _ = fs::remove_file(&name);
                let _ = mknod(&name, SFlag::S_IFIFO, Mode::S_IRUSR, 0);
                let _ = fs::remove_file(&name);
            }
        })
    };
    let until = std::time::Instant::now() + Duration::from_secs(3);
    let (mut whole, mut read) = (0, 0);
    while std::time::Instant::now() < until {
        let layers = layers(std::slice::from_ref(&upper));
        let Ok(mut walk) = Walk::new(&layers, Scope::Changes, Consistency::Live, TreePath::root()) else {
            continue;
        };
        loop {
            match walk.next_change() {
                Ok(None) => break whole += 1,
                Ok(Some(change)) => read += u32::from(own_content(&change.what)),
                Err(WalkError::Read { .. } | WalkError::Changed(_)) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    assert!(whole > 10 && read > 0, "{whole} walks, {read} files");
}

/// Reads a file and checks that it is not the host's.
fn own_content(what: &What) -> bool {
    let What::Entry(entry) = what else { return false };
    let EntryKind::File(content) = &entry.kind else { return false };
    let mut buffer = [0; 64];
    let Ok(mut reader) = content.open() else { return false };
    let Ok(Some(vmctr_images::upper::Piece::Data(count))) = reader.next(&mut buffer) else { return false };
    assert_ne!(&buffer[..count], b"the host's secret");
    true
}

#[test]
fn a_file_that_is_written_meanwhile_is_reported_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let upper = folder(&dir, "upper");
    let path = upper.join("busy");
    fs::write(&path, vec![1; 64 << 20]).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (stop, path) = (Arc::clone(&stop), path.clone());
        std::thread::spawn(move || {
            let mut file = fs::File::options().append(true).open(path).unwrap();
            while !stop.load(Ordering::Relaxed) {
                file.write_all(b"more").unwrap();
            }
        })
    };
    let opened = layers(std::slice::from_ref(&upper));
    let root = TreePath::root();
    let changes = Changes { layers: &opened, scope: Scope::Changes, subtree: &root };
    let mut changed = Vec::new();
    for number in 0..50 {
        let new = dir.path().join(format!("new{number}"));
        changed = capture(&changes, Consistency::Live, Namespace::Trusted, &new, &mut |_| Ok(()))
            .unwrap()
            .0
            .changed;
        assert!(new.join("busy").exists());
        if !changed.is_empty() {
            break;
        }
    }
    let mut layer = LayerWriter::new(std::io::sink(), PLAIN).unwrap();
    let mut walk = walk(&opened, Scope::Changes);
    let strict = loop {
        match walk.next_change() {
            Ok(Some(change)) => match layer.add(&change, &mut |_| {}) {
                Ok(()) => {}
                Err(error) => break error,
            },
            other => panic!("{other:?}"),
        }
    };
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert_eq!(changed, [TreePath::parse(b"busy").unwrap()]);
    assert!(matches!(strict, LayerError::Walk(WalkError::Changed(path)) if path.name() == Some(b"busy")));
}

/// A tar entry, for archives that our own writer refuses to make.
fn entry(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn apply_bytes(entries: &[Vec<u8>], root: &Path) -> Result<(), ApplyError> {
    let bytes = entries.concat();
    apply(LayerReader::new(&bytes[..], LIMIT).unwrap(), root, Form::Plain).map(drop)
}

#[test]
fn layers_that_try_to_leave_their_root() {
    let dir = tempfile::tempdir().unwrap();
    let outside = folder(&dir, "outside");
    fs::write(outside.join("kept"), "kept").unwrap();
    let target = outside.to_str().unwrap();
    for (number, entries) in [
        vec![entry("../escaped", b'0', "", b"x")],
        vec![entry("a/../../escaped", b'0', "", b"x")],
        vec![entry("out", b'2', target, b""), entry("out/escaped", b'0', "", b"x")],
        vec![entry("out", b'2', "../outside", b""), entry("out/escaped", b'0', "", b"x")],
        vec![entry("out", b'2', target, b""), entry("out/.wh.kept", b'0', "", b"")],
        vec![entry("out", b'2', target, b""), entry("out/.wh..wh..opq", b'0', "", b"")],
        vec![entry("hard", b'1', "../outside/kept", b""), entry("hard", b'0', "", b"x")],
        vec![entry("out", b'2', target, b""), entry("hard", b'1', "out/kept", b"")],
        vec![entry("out", b'2', target, b""), entry("out", b'0', "", b"replaced")],
        vec![entry("/absolute", b'0', "", b"x")],
    ]
    .into_iter()
    .enumerate()
    {
        let _ = apply_bytes(&entries, &folder(&dir, &format!("root{number}")));
        let left: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["kept"], "case {number}");
        assert_eq!(fs::read(outside.join("kept")).unwrap(), b"kept", "case {number}");
        assert!(!dir.path().join("escaped").exists(), "case {number}");
    }
}

#[test]
fn links_of_the_tree_are_resolved_within_it() {
    let dir = tempfile::tempdir().unwrap();
    let root = folder(&dir, "root");
    let entries = [
        entry("usr/bin/", b'5', "", b""),
        entry("bin", b'2', "/usr/bin", b""),
        entry("bin/tool", b'0', "", b"x"),
    ];
    apply_bytes(&entries, &root).unwrap();
    assert_eq!(fs::read(root.join("usr/bin/tool")).unwrap(), b"x");
}

#[test]
fn opaque_marks_spare_what_their_own_layer_made() {
    let dir = tempfile::tempdir().unwrap();
    let root = folder(&dir, "root");
    fs::create_dir_all(root.join("d/sub/old")).unwrap();
    fs::write(root.join("d/old"), "").unwrap();
    let entries = [
        entry("d/", b'5', "", b""),
        entry("d/sub/new", b'0', "", b"x"),
        entry("d/.wh..wh..opq", b'0', "", b""),
    ];
    apply_bytes(&entries, &root).unwrap();
    assert!(root.join("d/sub/new").exists());
    assert!(!root.join("d/old").exists() && !root.join("d/sub/old").exists());
}

#[test]
fn what_tar_readers_disagree_on_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ambiguous = |entries: &[Vec<u8>]| {
        let root = tempfile::tempdir_in(dir.path()).unwrap();
        matches!(
            apply_bytes(entries, root.path()),
            Err(ApplyError::Read(ReadError::Ambiguous { .. } | ReadError::Damaged { .. }))
        )
    };
    assert!(ambiguous(&[entry("d", b'5', "", b"content")]));
    assert!(ambiguous(&[entry("l", b'2', "x", b"content")]));
    assert!(ambiguous(&[entry("s", b'S', "", b"content")]));
    assert!(ambiguous(&[entry("v", b'V', "", b"")]));
    assert!(ambiguous(&[entry("g", b'g', "", b"13 path=evil\n"), entry("f", b'0', "", b"")]));
    assert!(ambiguous(&[entry("x", b'x', "", b"22 GNU.sparse.major=1\n"), entry("f", b'0', "", b"")]));
    assert!(ambiguous(&[entry("x", b'x', "", b"10 size=3"), entry("f", b'0', "", b"abc")]));
    assert!(ambiguous(&[entry(".wh.", b'0', "", b"")]));
    assert!(ambiguous(&[entry(".wh..wh.x", b'0', "", b"")]));
    assert!(!ambiguous(&[entry("f", b'0', "", b"abc")]));
}

#[test]
fn a_hard_link_to_nothing_or_to_a_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for first in ["nothing", "d", ""] {
        let result =
            apply_bytes(&[entry("d/", b'5', "", b""), entry("l", b'1', first, b"")], &folder(&dir, "root"));
        assert!(matches!(result, Err(ApplyError::Tree(TreeError::Link { .. }))), "{first}: {result:?}");
    }
}

#[test]
fn bombs_meet_the_limit() {
    let mut zeros = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    zeros.write_all(&entry("f", b'0', "", &vec![0; 8 << 20])).unwrap();
    let bomb = zeros.finish().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let result = apply(LayerReader::new(&bomb[..], 1 << 20).unwrap(), dir.path(), Form::Plain);
    assert!(result.is_err());
}
