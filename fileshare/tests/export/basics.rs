//! Each operation once, on a plain folder.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

use vmctr_fileshare::export::host::Config;

use super::rig::{Mounted, Place, in_private_namespace};

fn on_mount(test: impl FnOnce(&Mounted, &Place) + Send) {
    in_private_namespace(|| {
        let place = Place::new();
        let mounted = Mounted::within(&place.folder("served"), Config::new(place.folder("mnt")));
        test(&mounted, &place);
        mounted.unmount();
    });
}

#[test]
fn the_mount_is_named_and_restricted() {
    on_mount(|mounted, _| {
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        let ours = mounts.lines().find(|line| line.contains(mounted.root.to_str().unwrap())).unwrap();
        assert!(ours.starts_with("vmctr "), "{ours}");
        for part in ["fuse.vmctr", "nosuid", "nodev", "default_permissions", "allow_other"] {
            assert!(ours.contains(part), "{part} is missing: {ours}");
        }
    });
}

#[test]
fn files_are_written_and_read_on_both_sides() {
    on_mount(|mounted, place| {
        fs::write(mounted.path("a"), "from the host").unwrap();
        assert_eq!(fs::read(place.path("served/a")).unwrap(), b"from the host");
        fs::write(place.path("served/b"), "from the guest").unwrap();
        assert_eq!(fs::read(mounted.path("b")).unwrap(), b"from the guest");
        let big: Vec<u8> = (0..5_000_000u32).map(|at| (at / 7) as u8).collect();
        fs::write(mounted.path("big"), &big).unwrap();
        assert!(fs::read(place.path("served/big")).unwrap() == big);
        fs::write(place.path("served/big2"), &big).unwrap();
        assert!(fs::read(mounted.path("big2")).unwrap() == big);
    });
}

#[test]
fn folders_are_made_listed_and_removed() {
    on_mount(|mounted, _| {
        fs::create_dir_all(mounted.path("a/b/c")).unwrap();
        for name in 0..300 {
            fs::write(mounted.path(&format!("a/b/{name}")), name.to_string()).unwrap();
        }
        let mut names: Vec<_> =
            fs::read_dir(mounted.path("a/b")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 301);
        assert_eq!(fs::remove_dir(mounted.path("a")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
        fs::remove_dir_all(mounted.path("a")).unwrap();
        assert!(!mounted.path("a").exists());
    });
}

#[test]
fn names_are_moved_linked_and_followed() {
    on_mount(|mounted, place| {
        fs::write(mounted.path("one"), "1").unwrap();
        fs::hard_link(mounted.path("one"), mounted.path("two")).unwrap();
        assert_eq!(fs::metadata(mounted.path("one")).unwrap().nlink(), 2);
        assert_eq!(
            fs::metadata(mounted.path("one")).unwrap().ino(),
            fs::metadata(mounted.path("two")).unwrap().ino()
        );
        fs::rename(mounted.path("one"), mounted.path("three")).unwrap();
        assert!(!mounted.path("one").exists());
        fs::remove_file(mounted.path("three")).unwrap();
        assert_eq!(fs::metadata(mounted.path("two")).unwrap().nlink(), 1);
        symlink("two", mounted.path("link")).unwrap();
        assert_eq!(fs::read_link(mounted.path("link")).unwrap().to_str(), Some("two"));
        assert_eq!(fs::read(mounted.path("link")).unwrap(), b"1");
        assert!(place.path("served/link").symlink_metadata().unwrap().is_symlink());
    });
}

#[test]
fn an_open_file_outlives_its_name() {
    on_mount(|mounted, _| {
        fs::write(mounted.path("gone"), "still here").unwrap();
        let reading = File::open(mounted.path("gone")).unwrap();
        let mut writing = File::options().write(true).open(mounted.path("gone")).unwrap();
        fs::remove_file(mounted.path("gone")).unwrap();
        writing.seek(SeekFrom::End(0)).unwrap();
        writing.write_all(b", and more").unwrap();
        let mut text = String::new();
        (&reading).read_to_string(&mut text).unwrap();
        assert_eq!(text, "still here, and more");
        assert_eq!(reading.metadata().unwrap().nlink(), 0);
    });
}

#[test]
fn attributes_are_kept() {
    on_mount(|mounted, place| {
        let path = mounted.path("file");
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_001, 123_456_789);
        File::open(&path).unwrap().set_modified(time).unwrap();
        for path in [&path, &place.path("served/file")] {
            let meta = fs::metadata(path).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 12, 34));
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000_001, 123_456_789));
        }
        File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(fs::metadata(place.path("served/file")).unwrap().len(), 1 << 40);
    });
}

#[test]
fn appending_and_truncating_agree_with_the_guest() {
    on_mount(|mounted, place| {
        let path = mounted.path("log");
        let mut one = File::options().append(true).create(true).open(&path).unwrap();
        let mut other = File::options().append(true).open(&path).unwrap();
        one.write_all(b"first ").unwrap();
        other.write_all(b"second ").unwrap();
        one.write_all(b"third").unwrap();
        assert_eq!(fs::read(place.path("served/log")).unwrap(), b"first second third");
        File::options().write(true).truncate(true).open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        one.write_at(b"x", 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
    });
}

#[test]
fn sync_reaches_the_guest() {
    on_mount(|mounted, _| {
        let file = File::create(mounted.path("file")).unwrap();
        file.sync_all().unwrap();
        File::open(&mounted.root).unwrap().sync_all().unwrap();
        mounted.export().sync().unwrap();
    });
}
