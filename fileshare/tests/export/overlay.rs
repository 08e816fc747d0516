//! An overlay behind the mount: what goes up, what stays below, what the upper folder holds afterwards.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirEntryExt, FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, XattrFlags};

use vmctr_fileshare::export::host::Writes;

use super::apart::Spec;
use super::rig::{
    INDEXED, Mounted, Place, assert_errno, eventually, in_private_namespace, mount_overlay, mount_tmpfs,
};
use super::sys::Shared;

/// Runs a test on a mount whose files are read and written in the guest, then on one where they are on the host.
fn on_overlay(test: impl Fn(&Mounted, &Place) + Send + Sync) {
    for lending in [false, true] {
        on_one(lending, &test);
    }
}

fn on_one(lending: bool, test: impl Fn(&Mounted, &Place) + Send + Sync) {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::create_dir_all(lower.join("dir/sub")).unwrap();
        fs::write(lower.join("dir/sub/file"), "lower").unwrap();
        fs::write(lower.join("file"), "lower file").unwrap();
        fs::write(lower.join("link1"), "linked").unwrap();
        fs::hard_link(lower.join("link1"), lower.join("link2")).unwrap();
        let mounted = if lending {
            Mounted::lending(&place, "union", &lower)
        } else {
            Mounted::new(&place.overlay("union", &lower), &place.folder("mnt"))
        };
        test(&mounted, &place);
        mounted.unmount();
        assert_eq!(fs::read(lower.join("file")).unwrap(), b"lower file");
        assert_eq!(fs::read(lower.join("dir/sub/file")).unwrap(), b"lower");
    });
}

#[test]
fn changes_land_in_the_upper_folder_in_overlay_s_form() {
    on_overlay(|mounted, place| {
        fs::write(mounted.path("file"), "changed").unwrap();
        fs::remove_file(mounted.path("dir/sub/file")).unwrap();
        assert_eq!(fs::read(place.path("union/upper/file")).unwrap(), b"changed");
        let whiteout = fs::symlink_metadata(place.path("union/upper/dir/sub/file")).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    });
}

#[test]
fn a_lower_folder_is_renamed_not_copied() {
    on_overlay(|mounted, place| {
        fs::rename(mounted.path("dir"), mounted.path("moved")).unwrap();
        assert_eq!(fs::read(mounted.path("moved/sub/file")).unwrap(), b"lower");
        assert!(!mounted.path("dir").exists());
        assert!(!place.path("union/upper/moved/sub").exists());
        let mut value = [0; 32];
        let length =
            rustix::fs::getxattr(place.path("union/upper/moved"), "trusted.overlay.redirect", &mut value)
                .unwrap();
        assert_eq!(&value[..length], b"dir");
    });
}

#[test]
fn hard_links_stay_links_when_copied_up() {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::write(lower.join("link1"), "linked").unwrap();
        fs::hard_link(lower.join("link1"), lower.join("link2")).unwrap();
        let merged = place.overlay_by("union", &lower, INDEXED);
        let mounted = Mounted::new(&merged, &place.folder("mnt"));
        let ino = |name: &str| fs::metadata(mounted.path(name)).unwrap().ino();
        assert_eq!(ino("link1"), ino("link2"));
        fs::write(mounted.path("link2"), "both").unwrap();
        assert_eq!(fs::read(mounted.path("link1")).unwrap(), b"both");
        assert_eq!(ino("link1"), ino("link2"));
        fs::remove_file(mounted.path("link1")).unwrap();
        assert_eq!(fs::read(mounted.path("link2")).unwrap(), b"both");
        mounted.unmount();
    });
}

#[test]
fn a_file_that_overlay_gives_another_number_stays_one_file() {
    type Change = fn(&Path) -> std::io::Result<()>;
    let changes: [Change; 5] = [
        |path| File::options().append(true).open(path).map(drop),
        |path| fs::set_permissions(path, fs::Permissions::from_mode(0o640)),
        |path| fs::hard_link(path, path.with_file_name("link3")),
        |path| {
            fs::rename(path, path.with_file_name("moved"))?;
            fs::rename(path.with_file_name("moved"), path)
        },
        |path| Ok(rustix::fs::setxattr(path, "user.test", b"1", XattrFlags::empty())?),
    ];
    for change in changes {
        on_overlay(|mounted, _| {
            let link = mounted.path("link1");
            let early = File::open(&link).unwrap();
            assert_eq!(text_of(&early), "linked");
            assert_eq!(early.metadata().unwrap().nlink(), 2);
            change(&link).unwrap();
            let names = if mounted.path("link3").exists() { 2 } else { 1 };
            assert_eq!(early.metadata().unwrap().nlink(), names);
            fs::read_dir(&mounted.root).unwrap().for_each(drop);
            let again = File::open(&link).unwrap();
            assert_eq!(text_of(&again), "linked");
            fs::OpenOptions::new().write(true).open(&link).unwrap().write_at(b"LINK", 0).unwrap();
            assert_eq!((text_of(&early), text_of(&again)), ("LINKed".to_owned(), "LINKed".to_owned()));
            assert_eq!(early.metadata().unwrap().ino(), again.metadata().unwrap().ino());
            let mut listed = fs::read_dir(&mounted.root).unwrap().map(Result::unwrap);
            let listed = listed.find(|entry| entry.file_name() == "link1").unwrap();
            assert_eq!(listed.ino(), early.metadata().unwrap().ino());
            assert_eq!(fs::read(mounted.path("link2")).unwrap(), b"linked");
        });
    }
}

fn text_of(file: &File) -> String {
    let mut bytes = vec![0; 100];
    let length = file.read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

#[test]
fn hard_links_that_overlay_separates_are_two_files() {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::write(lower.join("link1"), "linked").unwrap();
        fs::hard_link(lower.join("link1"), lower.join("link2")).unwrap();
        let mounted = Mounted::new(&place.overlay("union", &lower), &place.folder("mnt"));
        assert_eq!(fs::read(mounted.path("link1")).unwrap(), b"linked");
        fs::write(mounted.path("link2"), "changed").unwrap();
        assert_eq!(fs::read(mounted.path("link1")).unwrap(), b"linked");
        assert_eq!(fs::read(place.path("union/upper/link2")).unwrap(), b"changed");
        assert!(!place.path("union/upper/link1").exists());
        mounted.unmount();
    });
}

#[test]
fn a_reader_sees_what_is_written_after_it_opened() {
    on_overlay(|mounted, _| {
        let mut early = File::open(mounted.path("file")).unwrap();
        let mut text = String::new();
        early.read_to_string(&mut text).unwrap();
        assert_eq!(text, "lower file");
        let mapped = Shared::of(&early, 10, false).unwrap();
        let writer = File::options().write(true).open(mounted.path("file")).unwrap();
        writer.write_at(b"UPPER", 0).unwrap();
        text.clear();
        early.seek(SeekFrom::Start(0)).unwrap();
        early.read_to_string(&mut text).unwrap();
        assert_eq!(text, "UPPER file");
        assert_eq!(mapped.get(0), b'U');
        writer.set_len(2).unwrap();
        text.clear();
        early.seek(SeekFrom::Start(0)).unwrap();
        early.read_to_string(&mut text).unwrap();
        assert_eq!(text, "UP");
    });
}

#[test]
fn shared_mappings_are_one_memory() {
    on_overlay(|mounted, place| {
        let open = || File::options().read(true).write(true).open(mounted.path("file")).unwrap();
        let (one, other) = (open(), open());
        let (first, second) = (Shared::of(&one, 10, true).unwrap(), Shared::of(&other, 10, true).unwrap());
        first.set(0, b'L');
        assert_eq!(second.get(0), b'L');
        second.set(1, b'O');
        let mut bytes = [0; 2];
        one.read_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"LO");
        first.sync();
        assert_eq!(fs::read(place.path("union/upper/file")).unwrap(), b"LOwer file");
        other.write_at(b"x", 2).unwrap();
        assert_eq!(first.get(2), b'x');
    });
}

#[test]
fn holes_are_made_and_found() {
    on_overlay(|mounted, _| {
        let file = File::create(mounted.path("sparse")).unwrap();
        file.write_all_at(&[1; 65536], 0).unwrap();
        file.write_all_at(&[2; 65536], 1 << 20).unwrap();
        let seek = |to| rustix::fs::seek(&file, to);
        assert_eq!(seek(rustix::fs::SeekFrom::Hole(0)), Ok(65536));
        assert_eq!(seek(rustix::fs::SeekFrom::Data(65536)), Ok(1 << 20));
        assert_eq!(seek(rustix::fs::SeekFrom::Data((1 << 20) + 65536)), Err(rustix::io::Errno::NXIO));
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, punch, 0, 32768).unwrap();
        assert_eq!(seek(rustix::fs::SeekFrom::Data(0)), Ok(32768));
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 4 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
        let copy = File::create(mounted.path("copy")).unwrap();
        let from = File::open(mounted.path("sparse")).unwrap();
        let copied = rustix::fs::copy_file_range(&from, Some(&mut 32768), &copy, Some(&mut 0), 4096).unwrap();
        assert_eq!(copied, 4096);
        assert_eq!(fs::read(mounted.path("copy")).unwrap(), [1; 4096]);
    });
}

#[test]
fn attributes_of_all_kinds_pass() {
    on_overlay(|mounted, _| {
        let path = mounted.path("dir/sub/file");
        let set = |name: &str, value: &[u8], flags| rustix::fs::setxattr(&path, name, value, flags);
        set("user.one", b"1", XattrFlags::empty()).unwrap();
        set("trusted.two", b"22", XattrFlags::empty()).unwrap();
        assert_eq!(set("user.one", b"x", XattrFlags::CREATE), Err(rustix::io::Errno::EXIST));
        assert_eq!(set("user.none", b"x", XattrFlags::REPLACE), Err(rustix::io::Errno::NODATA));
        let mut value = [0; 8];
        assert_eq!(rustix::fs::getxattr(&path, "trusted.two", &mut value), Ok(2));
        assert_eq!(rustix::fs::getxattr(&path, "trusted.two", &mut [0; 1]), Err(rustix::io::Errno::RANGE));
        assert_eq!(rustix::fs::getxattr_query(&path, "trusted.two"), Ok(2));
        let mut list = [0; 256];
        let length = rustix::fs::listxattr(&path, &mut list).unwrap();
        let list = String::from_utf8(list[..length].to_vec()).unwrap();
        assert!(list.contains("user.one\0") && list.contains("trusted.two\0"), "{list:?}");
        assert!(!list.contains("overlay"), "{list:?}");
        rustix::fs::removexattr(&path, "user.one").unwrap();
        assert_eq!(rustix::fs::getxattr(&path, "user.one", &mut value), Err(rustix::io::Errno::NODATA));
    });
}

#[test]
fn files_without_a_name_get_one_or_vanish() {
    on_overlay(|mounted, _| {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, mounted.path("dir"), flags, Mode::from_raw_mode(0o600)).unwrap();
        let mut file = File::from(file);
        file.write_all(b"nameless").unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        let magic = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let follow = rustix::fs::AtFlags::SYMLINK_FOLLOW;
        rustix::fs::linkat(CWD, magic, CWD, mounted.path("dir/named"), follow).unwrap();
        assert_eq!(fs::read(mounted.path("dir/named")).unwrap(), b"nameless");
    });
}

#[test]
fn special_files_are_named_and_never_opened_in_the_guest() {
    on_overlay(|mounted, _| {
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(CWD, mounted.path("fifo"), fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(fs::metadata(mounted.path("fifo")).unwrap().file_type().is_fifo());
        let device = rustix::fs::FileType::CharacterDevice;
        let number = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(CWD, mounted.path("null"), device, Mode::from_raw_mode(0o666), number).unwrap();
        assert_eq!(fs::metadata(mounted.path("null")).unwrap().rdev(), number);
        // The mount has no devices.
        assert_errno(File::open(mounted.path("null")), libc::EACCES);
    });
}

#[test]
fn folders_of_ten_thousand_are_listed_whole() {
    on_overlay(|mounted, place| {
        let many = place.folder("union/merged/many");
        for at in 0..10_000 {
            File::create(many.join(format!("file-with-a-longer-name-{at:05}"))).unwrap();
        }
        let list = || {
            let mut names: Vec<_> = fs::read_dir(mounted.path("many"))
                .unwrap()
                .map(|entry| entry.unwrap())
                .map(|entry| (entry.file_name(), entry.metadata().unwrap().len()))
                .collect();
            names.sort();
            names.dedup();
            names.len()
        };
        assert_eq!(list(), 10_000);
        assert_eq!(list(), 10_000, "the second time");
        for (at, entry) in fs::read_dir(mounted.path("many")).unwrap().enumerate() {
            let entry = entry.unwrap();
            if at % 2 == 0 {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        assert_eq!(list(), 5_000);
    });
}

#[test]
fn a_listing_goes_on_where_it_was_though_names_went_and_another_began() {
    on_overlay(|mounted, _| {
        // Another test may have the kernel drop its caches just then.
        assert!((0..5).any(|attempt| goes_on(mounted, attempt)), "names that the listing lacks");
    });
}

/// Whether a reader of the root finds all that stays while files are removed.
fn goes_on(mounted: &Mounted, attempt: usize) -> bool {
    for at in 0..4000 {
        File::create(mounted.path(&format!("file{attempt}-{at:05}"))).unwrap();
    }
    let names = || fs::read_dir(&mounted.root).unwrap().map(|entry| entry.unwrap().file_name());
    let all: BTreeSet<_> = names().collect();
    let mut reading = names();
    let mut read: BTreeSet<_> = reading.by_ref().take(1).collect();
    let gone = names().filter(|name| name.as_encoded_bytes().starts_with(b"file"));
    let gone: BTreeSet<_> = gone.take(500).collect();
    gone.iter().for_each(|name| fs::remove_file(mounted.root.join(name)).unwrap());
    let left: BTreeSet<_> = &all - &gone;
    assert_eq!(names().collect::<BTreeSet<_>>(), left);
    read.extend(reading);
    assert_eq!(names().collect::<BTreeSet<_>>(), left);
    left.is_subset(&read)
}

#[test]
fn a_full_disk_is_told_to_who_writes() {
    [false, true].into_iter().for_each(on_a_small_disk);
}

fn on_a_small_disk(lending: bool) {
    in_private_namespace(|| {
        let place = Place::new();
        let (lower, small) = (place.folder("lower"), place.folder("small"));
        fs::write(lower.join("big"), vec![7; 2 << 20]).unwrap();
        mount_tmpfs(&small, "size=1m");
        let (upper, work) = (place.folder("small/upper"), place.folder("small/work"));
        let merged = place.folder("merged");
        mount_overlay(&merged, &lower, &upper, &work);
        let (mountpoint, writes) = (place.folder("mnt"), Writes::Through);
        let layers = lending.then(|| (upper.clone(), lower.clone()));
        let mounted = Mounted::apart(&Spec { folder: &merged, mountpoint: &mountpoint, writes, layers });
        let file = File::create(mounted.path("new")).unwrap();
        let mut failed = None;
        for at in 0..64 {
            if let Err(error) = file.write_at(&[1; 65536], at * 65536) {
                failed = error.raw_os_error();
                break;
            }
        }
        assert_eq!(failed, Some(libc::ENOSPC));
        assert_errno(File::options().write(true).open(mounted.path("big")), libc::ENOSPC);
        drop(file);
        fs::remove_file(mounted.path("new")).unwrap();
        // close(2) does not wait until the file, and its space, is let go.
        eventually("room", || fs::write(mounted.path("new"), [1; 65536]).is_ok());
        mounted.unmount();
        rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::DETACH).unwrap();
        rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
    });
}

#[test]
fn read_only_is_refused_by_whichever_side_is() {
    in_private_namespace(|| {
        let place = Place::new();
        let (one, other) = (place.folder("one"), place.folder("other"));
        fs::write(one.join("file"), "").unwrap();
        let merged = place.folder("merged");
        let options = format!("lowerdir={}:{}", one.display(), other.display());
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", &merged, "overlay", flags, Some(options.as_c_str())).unwrap();
        let mounted = Mounted::new(&merged, &place.folder("mnt"));
        assert_refuses_writes(&mounted.root);
        mounted.unmount();

        let mut config = vmctr_fileshare::export::host::Config::new(place.folder("mnt"));
        config.restrictions |= rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY;
        let mounted = Mounted::within(&one, config);
        assert_refuses_writes(&mounted.root);
        mounted.unmount();
    });
}

fn assert_refuses_writes(root: &Path) {
    assert_errno(File::create(root.join("new")), libc::EROFS);
    assert_errno(File::options().write(true).open(root.join("file")), libc::EROFS);
    assert_errno(fs::remove_file(root.join("file")), libc::EROFS);
    assert_errno(fs::create_dir(root.join("dir")), libc::EROFS);
}

#[test]
fn the_file_system_s_measures_are_the_upper_s() {
    on_overlay(|mounted, place| {
        let ours = rustix::fs::statvfs(&mounted.root).unwrap();
        let upper = rustix::fs::statvfs(place.path("union/upper")).unwrap();
        assert_eq!((ours.f_blocks, ours.f_files), (upper.f_blocks, upper.f_files));
        assert_eq!(ours.f_namemax, 255);
    });
}
