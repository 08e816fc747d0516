//! Files of the upper folder, read and written by the host: without asking, and as if it had been asked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use vmctr_fileshare::export::guest::{Layers, Server};
use vmctr_fileshare::export::host::Config;
use vmctr_fileshare::export::wire::abi::op;

use super::rig::{INDEXED, Mounted, Place, assert_errno, in_private_namespace};
use super::steps::forget;

/// How many files the host lends at the same time.
const MOST: usize = 1024;

fn on_union(test: impl FnOnce(&Mounted, &Place) + Send) {
    on_one(Place::overlay, test);
}

fn on_one(overlay: fn(&Place, &str, &Path) -> PathBuf, test: impl FnOnce(&Mounted, &Place) + Send) {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::write(lower.join("low"), "lower").unwrap();
        fs::write(lower.join("one"), "two names").unwrap();
        fs::hard_link(lower.join("one"), lower.join("two")).unwrap();
        let merged = overlay(&place, "union", &lower);
        let upper = place.path("union/upper");
        let layers = Layers::open(Some(&upper), std::slice::from_ref(&lower)).unwrap();
        let server = Server::new(&merged).unwrap().with_layers(layers);
        let config =
            Config { layers: vec![lower.clone()], upper: Some(upper), ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        test(&mounted, &place);
        mounted.unmount();
        assert_eq!(fs::read(lower.join("low")).unwrap(), b"lower");
    });
}

fn indexed(place: &Place, name: &str, lower: &Path) -> PathBuf {
    place.overlay_by(name, lower, INDEXED)
}

fn upper(place: &Place, name: &str) -> PathBuf {
    place.path("union/upper").join(name)
}

fn writing(mounted: &Mounted, name: &str) -> File {
    File::options().read(true).write(true).open(mounted.path(name)).unwrap()
}

/// How often the guest was asked about what files hold.
fn asked(mounted: &Mounted) -> BTreeMap<u32, u64> {
    let wanted = [op::READ, op::WRITE, op::FSYNC, op::FALLOCATE, op::LSEEK, op::COPY_FILE_RANGE];
    mounted.export().turns().into_iter().filter(|(opcode, _)| wanted.contains(opcode)).collect()
}

#[test]
fn a_copy_by_the_guest_goes_to_where_the_host_has_written() {
    on_one(indexed, |mounted, _| {
        writing(mounted, "low").write_all_at(b" and more", 5).unwrap();
        let (from, to) = (File::open(mounted.path("low")).unwrap(), writing(mounted, "one"));
        let copied = rustix::fs::copy_file_range(&from, Some(&mut 1), &to, Some(&mut 0), 100).unwrap();
        assert_eq!(copied, 13);
        assert_eq!(fs::read(mounted.path("two")).unwrap(), b"ower and more");
        assert_eq!(asked(mounted).get(&op::COPY_FILE_RANGE), Some(&1));
    });
}

#[test]
fn what_new_files_hold_never_crosses() {
    on_union(|mounted, place| {
        let mut file = File::create_new(mounted.path("new")).unwrap();
        file.write_all(b"one two").unwrap();
        file.sync_all().unwrap();
        file.sync_data().unwrap();
        assert_eq!(file.metadata().unwrap().len(), 7);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4096).unwrap();
        file.set_len(7).unwrap();
        drop(file);
        assert_eq!(fs::read(upper(place, "new")).unwrap(), b"one two");
        assert_eq!(fs::read(mounted.path("new")).unwrap(), b"one two");
        let (from, to) =
            (File::open(mounted.path("low")).unwrap(), File::create(mounted.path("copy")).unwrap());
        let copied = rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 3), 100).unwrap();
        assert_eq!(copied, 5);
        let from = File::open(mounted.path("new")).unwrap();
        rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 3).unwrap();
        assert_eq!(fs::read(mounted.path("copy")).unwrap(), b"onelower");
        assert_eq!(rustix::fs::seek(&to, rustix::fs::SeekFrom::Data(0)), Ok(0));
        assert_eq!(asked(mounted), BTreeMap::new());
        assert_eq!(mounted.export().figures().host_writes, 1);
    });
}

#[test]
fn a_copied_up_file_is_one_for_early_and_late_openers() {
    on_union(|mounted, place| {
        let ino = fs::metadata(mounted.path("low")).unwrap().ino();
        let mut early = File::open(mounted.path("low")).unwrap();
        let mut text = String::new();
        early.read_to_string(&mut text).unwrap();
        let (one, mut other) = (writing(mounted, "low"), writing(mounted, "low"));
        one.write_all_at(b"UP", 0).unwrap();
        other.seek(SeekFrom::End(0)).unwrap();
        other.write_all(b" more").unwrap();
        drop(one);
        other.write_all(b"!").unwrap();
        drop(other);
        text.clear();
        early.seek(SeekFrom::Start(0)).unwrap();
        early.read_to_string(&mut text).unwrap();
        assert_eq!(text, "UPwer more!");
        assert_eq!(fs::read(upper(place, "low")).unwrap(), b"UPwer more!");
        let meta = fs::metadata(mounted.path("low")).unwrap();
        assert_eq!((meta.ino(), meta.len()), (ino, 11), "the number that it had");
        assert_ne!(fs::metadata(upper(place, "low")).unwrap().ino(), ino, "or the test proves nothing");
        assert_eq!(asked(mounted).get(&op::WRITE), None);
    });
}

#[test]
fn names_come_and_go_while_a_file_is_written() {
    on_union(|mounted, place| {
        fs::create_dir(mounted.path("dir")).unwrap();
        let file = File::create_new(mounted.path("dir/a")).unwrap();
        file.write_all_at(b"1", 0).unwrap();
        fs::rename(mounted.path("dir/a"), mounted.path("dir/b")).unwrap();
        file.write_all_at(b"2", 1).unwrap();
        fs::rename(mounted.path("dir"), mounted.path("moved")).unwrap();
        fs::hard_link(mounted.path("moved/b"), mounted.path("c")).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 2);
        writing(mounted, "c").write_all_at(b"3", 2).unwrap();
        fs::remove_file(mounted.path("moved/b")).unwrap();
        fs::write(mounted.path("moved/b"), "another").unwrap();
        file.write_all_at(b"4", 3).unwrap();
        assert_eq!(fs::read(upper(place, "c")).unwrap(), b"1234");
        assert_eq!(fs::read(upper(place, "moved/b")).unwrap(), b"another");
        // Replaced, and still open.
        fs::rename(mounted.path("moved/b"), mounted.path("c")).unwrap();
        file.write_all_at(b"5", 4).unwrap();
        let mut held = [0; 5];
        file.read_exact_at(&mut held, 0).unwrap();
        assert_eq!((&held, file.metadata().unwrap().nlink()), (b"12345", 0));
        assert_eq!(fs::read(mounted.path("c")).unwrap(), b"another");
        assert_eq!(asked(mounted), BTreeMap::new());
    });
}

#[test]
fn a_file_that_is_forgotten_is_found_as_it_was_left() {
    on_union(|mounted, place| {
        for round in 1..4 {
            for name in ["low", "new"] {
                let mut file = File::options().append(true).create(true).open(mounted.path(name)).unwrap();
                file.write_all(&[b'x'; 5000]).unwrap();
            }
            forget();
            for (name, before) in [("low", 5), ("new", 0)] {
                let length = before + round * 5000;
                assert_eq!(fs::metadata(mounted.path(name)).unwrap().len(), length);
                assert_eq!(fs::metadata(upper(place, name)).unwrap().len(), length);
                assert_eq!(fs::read(mounted.path(name)).unwrap().len() as u64, length);
            }
        }
        nix::unistd::truncate(&mounted.path("new"), 3).unwrap();
        nix::unistd::truncate(&mounted.path("new"), 6).unwrap();
        assert_eq!(fs::read(mounted.path("new")).unwrap(), b"xxx\0\0\0");
        assert_eq!(asked(mounted), BTreeMap::new());
    });
}

#[test]
fn times_and_modes_that_are_set_stay() {
    on_union(|mounted, place| {
        let file = File::options().write(true).create_new(true).mode(0o400).open(mounted.path("f")).unwrap();
        file.write_all_at(b"text", 0).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 5);
        file.set_modified(time).unwrap();
        fs::set_permissions(mounted.path("f"), fs::Permissions::from_mode(0o640)).unwrap();
        drop(file);
        forget();
        for path in [mounted.path("f"), upper(place, "f")] {
            let meta = fs::metadata(path).unwrap();
            assert_eq!((meta.modified().unwrap(), meta.mode() & 0o7777, meta.len()), (time, 0o640, 4));
        }
    });
}

#[test]
fn what_the_host_cannot_open_the_guest_says_why() {
    on_union(|mounted, place| {
        fs::write(mounted.path("fixed"), "text").unwrap();
        let change = |how: &str| {
            assert!(Command::new("chattr").arg(how).arg(upper(place, "fixed")).status().unwrap().success());
        };
        change("+i");
        let refused = File::options().write(true).open(mounted.path("fixed"));
        change("-i");
        assert_errno(refused, libc::EPERM);
        fs::write(mounted.path("fixed"), "more").unwrap();
        assert_eq!(fs::read(upper(place, "fixed")).unwrap(), b"more");
    });
}

#[test]
fn files_that_an_overlay_counts_names_of_stay_the_guest_s() {
    on_one(indexed, |mounted, place| {
        let file = writing(mounted, "one");
        file.write_all_at(b"TWO", 0).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 2);
        assert_eq!(fs::read(mounted.path("two")).unwrap(), b"TWO names");
        assert_eq!(fs::read(place.path("union/merged/two")).unwrap(), b"TWO names");
        assert_eq!(mounted.export().figures().host_writes, 0);
    });
}

#[test]
fn more_files_than_the_host_opens_are_written_in_the_guest() {
    on_union(|mounted, place| {
        let open = |at: usize| {
            let mut file = File::create_new(mounted.path(&at.to_string())).unwrap();
            file.write_all(at.to_string().as_bytes()).unwrap();
            file
        };
        let files: Vec<_> = (0..MOST + 20).map(open).collect();
        assert_eq!(mounted.export().figures().host_writes as usize, MOST);
        assert_eq!(asked(mounted).get(&op::WRITE), Some(&20));
        // The next opener of one that is open there finds no room either; then there is some again.
        writing(mounted, "1030").write_all_at(b"X", 0).unwrap();
        assert_eq!(asked(mounted).get(&op::WRITE), Some(&21));
        drop(files);
        let read = |name: &str| fs::read(upper(place, name)).unwrap();
        assert_eq!(
            (read("7"), read("1030"), read("1043")),
            (b"7".to_vec(), b"X030".to_vec(), b"1043".to_vec())
        );
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while mounted.export().figures().host_writes as usize == MOST {
            assert!(std::time::Instant::now() < until, "files stay open");
            fs::write(mounted.path("later"), "later").unwrap();
        }
    });
}

#[test]
fn many_write_rename_and_append_at_once() {
    on_union(|mounted, place| {
        std::thread::scope(|scope| {
            for worker in 0..64 {
                scope.spawn(move || {
                    for round in 0..10u8 {
                        let temporary = mounted.path(&format!("t{worker}"));
                        fs::write(&temporary, [round; 3000]).unwrap();
                        fs::rename(&temporary, mounted.path(&format!("f{worker}"))).unwrap();
                        let log = File::options().append(true).create(true).open(mounted.path("log"));
                        log.unwrap().write_all(&[worker; 100]).unwrap();
                    }
                });
            }
        });
        let log = fs::read(upper(place, "log")).unwrap();
        assert_eq!(log.len(), 64_000);
        assert!(log.chunks(100).all(|chunk| chunk.iter().all(|byte| *byte == chunk[0])), "appends overlap");
        for worker in 0..64 {
            assert_eq!(fs::read(upper(place, &format!("f{worker}"))).unwrap(), [9; 3000]);
        }
        assert_eq!(asked(mounted).get(&op::WRITE), None);
    });
}
