//! Served folders against a guest that is played by hand.

use std::fs;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::super::layers::Layers;
use super::*;

/// Told by the guest.
fn told(nodeid: u64, path: &Path) -> Entry {
    let st = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS).unwrap();
    Entry { nodeid, attr: crate::export::stat::attr(&st, st.stx_ino) }
}

fn here(look: Look) -> u64 {
    match look {
        Look::Here(entry) => entry.nodeid,
        other => panic!("{other:?}"),
    }
}

/// A layer with `dir/sub/file`, and the node of `dir`, which is 7 to the guest.
fn layer() -> (tempfile::TempDir, Served, u64) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::create_dir_all(dir.path().join("dir/sub")).unwrap();
    fs::write(dir.path().join("dir/sub/file"), "text").unwrap();
    let served = Served::new(Beneath::new(Layers::open(&[dir.path().to_owned()]).unwrap()).unwrap());
    let entry = told(7, &dir.path().join("dir"));
    let id = served.settle(1, b"dir", &entry, Some((0, b"dir"))).id;
    assert!(is_own(id));
    (dir, served, id)
}

#[test]
fn what_the_guest_says_is_compared_with_the_layer() {
    let (dir, served, _) = layer();
    let entry = told(8, &dir.path().join("dir/sub"));
    let claims: [(usize, &[u8]); 6] =
        [(1, b"dir/sub"), (0, b"dir"), (0, b"none"), (0, b"/etc"), (0, b".."), (0, b"dir/sub/file")];
    for (layer, path) in claims {
        let settled = served.settle(1, b"x", &entry, Some((layer, path)));
        assert_eq!(settled.id, 8, "{}", String::from_utf8_lossy(path));
    }
    let merged = Entry { attr: Attr { nlink: 1, ..entry.attr }, ..entry };
    assert_eq!(served.settle(1, b"x", &merged, Some((0, b"dir/sub"))).id, 8);
    let again = || served.settle(1, b"x", &entry, Some((0, b"dir/sub"))).id;
    assert_eq!(again(), 8, "the kernel knows it by this number");
    served.forget(8, 8);
    assert!(is_own(again()));
}

#[test]
fn a_folder_of_which_the_guest_tells_what_the_host_should_have_is_left_to_it() {
    let (dir, served, id) = layer();
    let sub = here(served.look(id, b"sub"));
    let linked =
        Entry { attr: Attr { nlink: 2, ..told(30, &dir.path().join("dir/sub/file")).attr }, nodeid: 30 };
    assert_eq!(served.settle(sub, b"linked", &linked, None).id, 30);
    assert_eq!(served.look(sub, b"none"), Look::Absent, "of such files it tells always");
    let file = told(31, &dir.path().join("dir/sub/file"));
    assert_eq!(served.settle(sub, b"file", &file, None).id, 31);
    assert_eq!(served.look(sub, b"file"), Look::Guest);
    assert!(served.is_moved(sub) && served.attr(id).is_none() && !served.is_moved(id));
}

#[test]
fn a_node_keeps_its_number_when_the_guest_hears_of_it() {
    let (dir, served, id) = layer();
    let sub = here(served.look(id, b"sub"));
    let file = here(served.look(sub, b"file"));
    assert_eq!(here(served.look(sub, b"file")), file);
    assert_eq!(served.look(sub, b"other"), Look::Absent);
    assert_eq!(served.guest(file), None);
    let way = served.way(file).unwrap();
    assert_eq!((way.from, &way.nodes[..], &way.names[..]), (7, &[sub, file][..], &b"sub\0file\0"[..]));
    let found = [told(20, &dir.path().join("dir/sub")), told(21, &dir.path().join("dir/sub/file"))];
    assert!(served.bind(&way.nodes, &found));
    assert_eq!(served.guest(file), Some(21));
    assert_eq!(served.settle(99, b"elsewhere", &found[1], None).id, file);
    assert!(!served.bind(&[sub], &[told(22, dir.path())]), "bound to another already");
}

#[test]
fn a_guest_cannot_exchange_one_kind_for_another() {
    let (dir, served, id) = layer();
    let sub = here(served.look(id, b"sub"));
    let file = here(served.look(sub, b"file"));
    let swapped = [told(21, &dir.path().join("dir/sub/file")), told(20, &dir.path().join("dir/sub"))];
    assert!(!served.bind(&[sub, file], &swapped));
    assert!(!served.bind(&[sub, file], &swapped[..1]));
}

#[test]
fn what_changed_is_the_guest_s_to_tell() {
    let (dir, served, id) = layer();
    let sub = here(served.look(id, b"sub"));
    let file = here(served.look(sub, b"file"));
    assert!(served.attr(file).is_some() && served.attr(sub).is_some());
    served.change(file);
    assert!(served.attr(file).is_none() && served.attr(sub).is_none() && served.attr(id).is_none());
    assert_eq!(served.look(sub, b"file"), Look::Guest);
    served.forget(file, 1);
    assert_eq!(served.look(sub, b"file"), Look::Guest, "also when it was forgotten");
    fs::write(dir.path().join("dir/other"), "").unwrap();
    assert_eq!(served.change_name(id, b"other"), None);
    assert_eq!(served.look(id, b"other"), Look::Guest);
    assert!(served.list(id, 0, 100, false).is_none());
    let (listed, whole) = served.list(id, 0, 100, true).unwrap();
    assert!(whole && listed.iter().all(|one| one.node.is_none()), "a listing that began goes on, of names");
}

#[test]
fn whiteouts_leave_their_folder_to_the_guest() {
    let (dir, served, id) = layer();
    let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty());
    rustix::fs::mknodat(CWD, dir.path().join("dir/gone"), kind, mode, 0).unwrap();
    assert_eq!(served.look(id, b"gone"), Look::Guest);
    assert!(served.list(id, 0, 100, false).is_none());
    assert_eq!(served.look(id, b"new"), Look::Guest);
}

#[test]
fn files_with_several_names_are_left_to_the_guest() {
    let (dir, served, id) = layer();
    fs::hard_link(dir.path().join("dir/sub/file"), dir.path().join("dir/second")).unwrap();
    assert_eq!(served.look(id, b"second"), Look::Guest);
    let (listed, _) = served.list(id, 0, 100, false).unwrap();
    let second = listed.iter().find(|one| one.raw.name.to_bytes() == b"second").unwrap();
    assert!(second.node.is_none());
}

#[test]
fn nothing_is_kept_of_what_the_kernel_forgot() {
    let (dir, served, id) = layer();
    let sub = here(served.look(id, b"sub"));
    let file = here(served.look(sub, b"file"));
    let way = served.way(file).unwrap();
    let found = [told(20, &dir.path().join("dir/sub")), told(21, &dir.path().join("dir/sub/file"))];
    assert!(served.bind(&way.nodes, &found) && served.bind(&way.nodes, &found));
    assert!(served.forget(sub, 1).is_empty(), "one below it is known");
    assert!(served.forget(id, 1).is_empty());
    assert_eq!(served.forget(file, 1), [(21, 2), (20, 2), (7, 1)]);
    assert_eq!(served.len(), 0);
    assert_eq!(served.forget(7, 3), [(7, 3)], "one of the guest's own");
}

#[test]
fn who_loses_a_name_waits_for_who_is_finding_by_it() {
    let (_dir, served, id) = layer();
    here(served.look(id, b"sub"));
    let finding = served.binding();
    std::thread::scope(|scope| {
        let losing = scope.spawn(|| served.lose_name(id, b"sub"));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!losing.is_finished());
        drop(finding);
    });
}
