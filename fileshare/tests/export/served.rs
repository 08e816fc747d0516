//! Folders of one lower layer, served by the host: found without the guest, changed through it, and the same files
//! before and after.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::mount::MountPropagationFlags;
use vmctr_fileshare::export::guest::{Layers, Server};
use vmctr_fileshare::export::host::Config;
use vmctr_fileshare::export::wire::abi::op;

use super::rig::{Mounted, Place, assert_errno, in_private_namespace, mount_overlay};
use super::steps::{REMEMBERED, forget};

/// `base` has `dir/sub` with files in both, `top` has `other`; both have `both`.
fn make(place: &Place) -> (PathBuf, PathBuf) {
    let (top, base) = (place.folder("top"), place.folder("base"));
    for folder in ["dir/sub", "both"] {
        fs::create_dir_all(base.join(folder)).unwrap();
        for name in ["one", "two", "three"] {
            fs::write(base.join(folder).join(name), format!("{folder} {name}")).unwrap();
        }
    }
    fs::write(base.join("dir/file"), "in dir").unwrap();
    fs::write(base.join("dir/empty"), "").unwrap();
    fs::set_permissions(base.join("dir/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::symlink("sub/one", base.join("dir/link")).unwrap();
    fs::write(base.join("dir/linked"), "two names").unwrap();
    fs::hard_link(base.join("dir/linked"), base.join("dir/sub/linked")).unwrap();
    fs::create_dir_all(top.join("other/below")).unwrap();
    fs::create_dir_all(top.join("both")).unwrap();
    fs::write(top.join("both/four"), "four").unwrap();
    (top, base)
}

fn on_union(test: impl FnOnce(&Mounted, &Place) + Send) {
    in_private_namespace(|| {
        let place = Place::new();
        let (top, base) = make(&place);
        let (merged, upper) = (place.folder("merged"), place.folder("upper"));
        let lowers = PathBuf::from(format!("{}:{}", top.display(), base.display()));
        mount_overlay(&merged, &lowers, &upper, &place.folder("work"));
        let before = tree(&base);
        let lowers = vec![top, base.clone()];
        let server = Server::new(&merged).unwrap().with_layers(Layers::open(Some(&upper), &lowers).unwrap());
        let config = Config { layers: lowers, upper: Some(upper), ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        test(&mounted, &place);
        mounted.unmount();
        assert_eq!(tree(&base), before, "a lower layer was changed");
    });
}

/// Everything that stat(2) tells of each file, but for times of access; and its contents.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    walk(root, root, &mut all, true);
    all
}

/// The same without what a copy-up does to the folders around the file: that is seen when they are next asked for.
fn changed_tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    walk(root, root, &mut all, false);
    all
}

fn walk(root: &Path, folder: &Path, all: &mut BTreeMap<PathBuf, String>, exact: bool) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (path, meta) = (entry.path(), fs::symlink_metadata(entry.path()).unwrap());
        let what = match () {
            () if meta.is_dir() => Vec::new(),
            () if meta.is_symlink() => fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes(),
            () => fs::read(&path).unwrap(),
        };
        let aside = meta.is_dir() && !exact;
        let ctime = if aside { (0, 0) } else { (meta.ctime(), meta.ctime_nsec()) };
        let times = (meta.mtime(), meta.mtime_nsec(), ctime);
        let sizes = if aside { (0, 0, 0) } else { (meta.size(), meta.blocks(), meta.nlink()) };
        let owner = (meta.mode(), meta.uid(), meta.gid(), meta.rdev());
        let inode = (meta.ino(), std::os::unix::fs::DirEntryExt::ino(&entry));
        all.insert(
            path.strip_prefix(root).unwrap().to_owned(),
            format!("{inode:?} {owner:?} {sizes:?} {times:?} {}", String::from_utf8_lossy(&what)),
        );
        if meta.is_dir() {
            walk(root, &path, all, exact);
        }
    }
}

#[test]
fn what_is_mounted_below_a_layer_is_not_in_the_union() {
    in_private_namespace(|| {
        let place = Place::new();
        let (top, base) = make(&place);
        // As on a host with systemd: what is mounted there later shows in all copies of the mount that are not private.
        rustix::mount::mount_bind(&base, &base).unwrap();
        rustix::mount::mount_change(&base, MountPropagationFlags::SHARED).unwrap();
        let (merged, upper) = (place.folder("merged"), place.folder("upper"));
        let lowers = PathBuf::from(format!("{}:{}", top.display(), base.display()));
        mount_overlay(&merged, &lowers, &upper, &place.folder("work"));
        let below = place.folder("below");
        fs::write(below.join("file"), "bound over it").unwrap();
        // Of the same file system, where a device number tells nothing.
        rustix::mount::mount_bind(below.join("file"), base.join("dir/file")).unwrap();
        rustix::mount::mount_bind(&below, base.join("dir/sub")).unwrap();
        let lowers = vec![top, base.clone()];
        let server = Server::new(&merged).unwrap().with_layers(Layers::open(Some(&upper), &lowers).unwrap());
        let config = Config { layers: lowers, upper: Some(upper), ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        let seen = |name: &str| {
            let st = fs::metadata(mounted.path(name)).unwrap();
            assert_eq!(
                (st.ino(), st.len()),
                fs::metadata(merged.join(name)).map(|st| (st.ino(), st.len())).unwrap()
            );
            fs::read_to_string(mounted.path(name)).unwrap()
        };
        assert_eq!(seen("dir/file"), "in dir");
        assert_eq!(seen("dir/sub/one"), "dir/sub one");
        forget();
        rustix::mount::mount_bind(below.join("file"), base.join("dir/empty")).unwrap();
        assert_eq!(seen("dir/empty"), "");
        assert_eq!(tree(&mounted.root), tree(&merged));
        mounted.unmount();
    });
}

/// How often the guest was asked for nodes.
fn asked(mounted: &Mounted) -> BTreeMap<u32, u64> {
    let wanted =
        [op::LOOKUP, op::OPENDIR_READ, op::READDIRPLUS, op::GETATTR, op::FIND, op::READLINK, op::READ];
    mounted.export().turns().into_iter().filter(|(opcode, _)| wanted.contains(opcode)).collect()
}

#[test]
fn a_tree_is_as_the_overlay_shows_it_and_the_guest_is_asked_for_merged_folders_only() {
    let _kept = REMEMBERED.write();
    on_union(|mounted, place| {
        assert_eq!(tree(&mounted.root), tree(&place.path("merged")));
        let asked = asked(mounted);
        assert_eq!(asked.get(&op::OPENDIR_READ), Some(&2), "the root and `both`: {asked:?}");
        assert_eq!(asked.get(&op::GETATTR), Some(&1), "the root's: {asked:?}");
        assert_eq!(asked.get(&op::READLINK), None, "{asked:?}");
        // Those of the file with two names, by each of them, in two folders that the guest did not know.
        assert!(asked.get(&op::LOOKUP) <= Some(&2), "{asked:?}");
        assert!(asked.get(&op::FIND) <= Some(&1), "{asked:?}");
    });
}

#[test]
fn names_are_found_without_a_listing() {
    let _kept = REMEMBERED.write();
    on_union(|mounted, _| {
        assert_eq!(fs::read(mounted.path("dir/sub/two")).unwrap(), b"dir/sub two");
        assert_errno(fs::metadata(mounted.path("dir/sub/none")), libc::ENOENT);
        assert_errno(fs::metadata(mounted.path("dir/sub/two/x")), libc::ENOTDIR);
        let mut value = [0; 8];
        let none = rustix::fs::getxattr(mounted.path("dir/sub/two"), "user.none", &mut value);
        assert_eq!(none, Err(rustix::io::Errno::NODATA));
        assert_eq!(rustix::fs::listxattr(mounted.path("dir/sub/two"), &mut value), Ok(0));
        let asked: Vec<_> = asked(mounted).into_iter().collect();
        assert_eq!(asked, [(op::LOOKUP, 1), (op::GETATTR, 1)], "`dir` itself, and the root's attributes");
    });
}

#[test]
fn a_file_stays_the_same_file_when_it_is_changed() {
    on_union(|mounted, place| {
        let path = mounted.path("dir/sub/one");
        let (before, early) = (fs::metadata(&path).unwrap(), File::open(&path).unwrap());
        let mut bytes = [0; 7];
        early.read_at(&mut bytes, 0).unwrap();
        File::options().append(true).open(&path).unwrap().write_all(b" more").unwrap();
        let mut text = String::new();
        (&early).read_to_string(&mut text).unwrap();
        assert_eq!(text, "dir/sub one more");
        let after = fs::metadata(&path).unwrap();
        assert_eq!((before.ino(), before.dev(), after.len()), (after.ino(), after.dev(), 16));
        assert_eq!(early.metadata().unwrap().len(), 16);
        assert_eq!(fs::read(place.path("upper/dir/sub/one")).unwrap(), b"dir/sub one more");
        forget();
        assert_eq!(fs::metadata(&path).unwrap().len(), 16, "found again");
        assert_eq!(changed_tree(&mounted.root), changed_tree(&place.path("merged")));
    });
}

#[test]
fn names_that_come_and_go_are_seen() {
    on_union(|mounted, place| {
        let names = |folder: &str| {
            let names = fs::read_dir(mounted.path(folder)).unwrap();
            let mut names: Vec<_> =
                names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names("dir/sub"), ["linked", "one", "three", "two"]);
        fs::remove_file(mounted.path("dir/sub/one")).unwrap();
        fs::write(mounted.path("dir/sub/zero"), "new").unwrap();
        fs::rename(mounted.path("dir/sub/two"), mounted.path("dir/moved")).unwrap();
        assert_eq!(names("dir/sub"), ["linked", "three", "zero"]);
        assert_errno(fs::metadata(mounted.path("dir/sub/one")), libc::ENOENT);
        assert_eq!(fs::read(mounted.path("dir/moved")).unwrap(), b"dir/sub two");
        fs::create_dir(mounted.path("dir/new")).unwrap();
        fs::hard_link(mounted.path("dir/sub/three"), mounted.path("dir/new/hard")).unwrap();
        assert_eq!(fs::metadata(mounted.path("dir/sub/three")).unwrap().nlink(), 2);
        fs::remove_dir_all(mounted.path("other")).unwrap();
        for _ in 0..2 {
            assert_eq!(changed_tree(&mounted.root), changed_tree(&place.path("merged")));
            forget();
        }
    });
}

#[test]
fn a_renamed_folder_is_served_on() {
    on_union(|mounted, place| {
        let open = File::open(mounted.path("dir/sub/one")).unwrap();
        let inode = fs::metadata(mounted.path("dir/sub")).unwrap().ino();
        fs::rename(mounted.path("dir/sub"), mounted.path("other/below/here")).unwrap();
        assert_errno(fs::metadata(mounted.path("dir/sub")), libc::ENOENT);
        assert_eq!(fs::metadata(mounted.path("other/below/here")).unwrap().ino(), inode);
        assert_eq!(fs::read(mounted.path("other/below/here/two")).unwrap(), b"dir/sub two");
        let mut bytes = [0; 7];
        open.read_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"dir/sub");
        fs::write(mounted.path("other/below/here/three"), "changed").unwrap();
        fs::create_dir(mounted.path("dir/sub")).unwrap();
        assert_eq!(fs::read_dir(mounted.path("dir/sub")).unwrap().count(), 0);
        for _ in 0..2 {
            assert_eq!(changed_tree(&mounted.root), changed_tree(&place.path("merged")));
            forget();
        }
    });
}

#[test]
fn a_listing_that_began_on_the_host_ends_there() {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::create_dir(lower.join("many")).unwrap();
        for at in 0..9000 {
            File::create(lower.join(format!("many/file-{at}"))).unwrap();
        }
        let merged = place.overlay("union", &lower);
        let layers = Layers::open(Some(&place.path("union/upper")), std::slice::from_ref(&lower)).unwrap();
        let server = Server::new(&merged).unwrap().with_layers(layers);
        let mounted =
            Mounted::serve(server, Config { layers: vec![lower], ..Config::new(place.folder("mnt")) });
        let mut seen = 0;
        for entry in fs::read_dir(mounted.path("many")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            seen += 1;
            if seen % 3 == 0 {
                fs::remove_file(mounted.path("many").join(&name)).unwrap();
                assert!(!mounted.path("many").join(&name).exists());
            }
        }
        assert_eq!(seen, 9000);
        assert_eq!(fs::read_dir(mounted.path("many")).unwrap().count(), 6000);
        assert_eq!(fs::read_dir(merged.join("many")).unwrap().count(), 6000);
        mounted.unmount();
    });
}

#[test]
fn marks_of_an_overlay_in_a_layer_are_the_guest_s_to_read() {
    in_private_namespace(|| {
        let place = Place::new();
        let (top, base) = (place.folder("top"), place.folder("base"));
        fs::create_dir_all(base.join("origin/deep")).unwrap();
        fs::write(base.join("origin/deep/file"), "from below").unwrap();
        fs::create_dir_all(top.join("moved/own")).unwrap();
        fs::write(top.join("moved/own/file"), "own").unwrap();
        let set = |path: &Path, name: &str, value: &[u8]| {
            rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
        };
        set(&top.join("moved"), "trusted.overlay.redirect", b"/origin");
        fs::create_dir_all(top.join("plain/hidden")).unwrap();
        set(&top.join("plain/hidden"), "trusted.overlay.opaque", b"y");
        fs::create_dir_all(base.join("plain/hidden")).unwrap();
        fs::write(base.join("plain/hidden/file"), "not seen").unwrap();
        let (merged, upper) = (place.folder("merged"), place.folder("upper"));
        let lowers = PathBuf::from(format!("{}:{}", top.display(), base.display()));
        mount_overlay(&merged, &lowers, &upper, &place.folder("work"));
        let lowers = vec![top, base];
        let server = Server::new(&merged).unwrap().with_layers(Layers::open(Some(&upper), &lowers).unwrap());
        let mounted = Mounted::serve(server, Config { layers: lowers, ..Config::new(place.folder("mnt")) });
        assert_eq!(fs::read(mounted.path("moved/deep/file")).unwrap(), b"from below");
        assert_eq!(fs::read_dir(mounted.path("plain/hidden")).unwrap().count(), 0);
        assert_eq!(tree(&mounted.root), tree(&merged));
        mounted.unmount();
    });
}

#[test]
fn writers_movers_and_readers_at_once_see_one_tree() {
    on_union(|mounted, place| {
        std::thread::scope(|scope| {
            for worker in 0..4 {
                scope.spawn(move || {
                    for round in 0..40 {
                        let (sub, name) = (mounted.path("dir/sub"), format!("w{worker}"));
                        fs::write(sub.join(&name), round.to_string()).unwrap();
                        fs::rename(sub.join(&name), mounted.path("other").join(&name)).unwrap();
                        fs::rename(mounted.path("other").join(&name), sub.join(&name)).unwrap();
                        let _ = fs::read_dir(&sub).unwrap().count();
                        let one = File::options().append(true).open(sub.join("one"));
                        one.unwrap().write_all(b".").unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read(mounted.path("dir/sub/one")).unwrap().len(), 11 + 160);
        assert_eq!(changed_tree(&mounted.root), changed_tree(&place.path("merged")));
    });
}

#[test]
fn what_is_found_for_a_change_takes_no_turn_of_its_own() {
    let _kept = REMEMBERED.write();
    on_union(|mounted, place| {
        for name in ["sub/one", "sub/two", "empty", "file"] {
            fs::metadata(mounted.path("dir").join(name)).unwrap();
        }
        let before = mounted.export().turns();
        fs::remove_file(mounted.path("dir/sub/one")).unwrap();
        File::options().append(true).open(mounted.path("dir/sub/two")).unwrap();
        fs::rename(mounted.path("dir/empty"), mounted.path("dir/file")).unwrap();
        let taken = |opcode| {
            let count = |turns: &[(u32, u64)]| {
                turns.iter().find(|(known, _)| *known == opcode).map_or(0, |(_, count)| *count)
            };
            count(&mounted.export().turns()) - count(&before)
        };
        // One of the two names that a rename takes is found before.
        assert_eq!([op::UNLINK, op::OPEN, op::RENAME, op::FIND].map(taken), [1, 1, 1, 1]);
        assert_eq!(changed_tree(&mounted.root), changed_tree(&place.path("merged")));
    });
}

#[test]
fn a_name_that_is_taken_while_it_is_being_found_is_found_or_gone() {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        for at in 0..400 {
            fs::create_dir_all(lower.join(format!("many/{at}"))).unwrap();
            fs::write(lower.join(format!("many/{at}/file")), "text").unwrap();
        }
        let merged = place.overlay("union", &lower);
        let layers = Layers::open(Some(&place.path("union/upper")), std::slice::from_ref(&lower)).unwrap();
        let server = Server::new(&merged).unwrap().with_layers(layers);
        let config = Config { layers: vec![lower], ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        let file = |at: u32| mounted.path("many").join(at.to_string()).join("file");
        (0..400).for_each(|at| assert!(file(at).exists()));
        std::thread::scope(|scope| {
            let append =
                |at: u32| File::options().append(true).open(file(at)).and_then(|mut f| f.write_all(b"!"));
            let gone = |result: std::io::Result<()>| match result.map_err(|error| error.raw_os_error()) {
                // An overlay itself says EEXIST when a copy-up meets a rename.
                Ok(()) | Err(Some(libc::ENOENT | libc::ESTALE | libc::EEXIST)) => {}
                Err(other) => panic!("{other:?}"),
            };
            scope.spawn(move || (0..400).for_each(|at| gone(append(at))));
            let moved = mounted.path("many");
            scope.spawn(move || {
                for at in (0..400).step_by(2) {
                    gone(fs::rename(moved.join(at.to_string()), moved.join(format!("moved-{at}"))));
                }
            });
            scope.spawn(move || (0..400).step_by(3).for_each(|at| gone(fs::remove_file(file(at)))));
        });
        assert_eq!(changed_tree(&mounted.root), changed_tree(&merged));
        mounted.unmount();
    });
}

#[test]
fn nodes_that_are_open_nowhere_are_not_forgotten_for_want_of_open_files() {
    let _kept = REMEMBERED.write();
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::create_dir(lower.join("many")).unwrap();
        for at in 0..500 {
            File::create(lower.join(format!("many/{at}"))).unwrap();
        }
        let merged = place.overlay("union", &lower);
        let layers = Layers::open(Some(&place.path("union/upper")), std::slice::from_ref(&lower)).unwrap();
        let server = Server::new(&merged).unwrap().with_layers(layers);
        let config = Config { layers: vec![lower], most_nodes: 50, ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        assert_eq!(fs::read_dir(mounted.path("many")).unwrap().count(), 500);
        std::thread::sleep(std::time::Duration::from_millis(600));
        assert!(mounted.export().figures().nodes > 400, "{:?}", mounted.export().figures());
        for at in 0..500 {
            File::options().append(true).open(mounted.path("many").join(at.to_string())).unwrap();
        }
        // These the guest has open.
        super::rig::eventually_fewer(&mounted, 200);
        mounted.unmount();
    });
}

#[test]
fn a_listing_from_the_kernel_s_cache_goes_on_when_the_cache_is_gone() {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::create_dir(lower.join("many")).unwrap();
        let name = |at: u32| format!("{at}-{}", "x".repeat(60));
        (0..3000).for_each(|at| drop(File::create(lower.join("many").join(name(at))).unwrap()));
        let merged = place.overlay("union", &lower);
        let layers = Layers::open(Some(&place.path("union/upper")), std::slice::from_ref(&lower)).unwrap();
        let server = Server::new(&merged).unwrap().with_layers(layers);
        let config = Config { layers: vec![lower], ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        let many = mounted.path("many");
        let list =
            || fs::read_dir(&many).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let changes: [fn(&Path); 2] = [|_| forget(), |many| drop(File::create(many.join("new")).unwrap())];
        for change in changes {
            assert!(list().count() >= 3000);
            let mut slow = list();
            let mut seen: BTreeSet<_> = slow.by_ref().take(10).collect();
            change(&many);
            assert!(list().count() >= 3000);
            seen.extend(slow);
            assert_eq!((0..3000).find(|at| !seen.contains(&name(*at))), None);
        }
        mounted.unmount();
    });
}
