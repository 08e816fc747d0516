//! Large lower files, read on the host: the same bytes, also after somebody changed them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmctr_fileshare::export::guest::{Layers, Server};
use vmctr_fileshare::export::host::{Config, Writes};
use vmctr_fileshare::export::wire::abi::op;

use super::apart::Spec;
use super::rig::{Mounted, Place, in_private_namespace};
use super::steps::forget;
use super::sys::Shared;

const LENGTH: usize = 8 << 20;

fn content(at: usize) -> u8 {
    (at / 4096 % 251) as u8
}

type Serve = fn(&Place, &Path, &Path) -> Mounted;

fn on_layers(serve: Serve, test: impl FnOnce(&Mounted, &Place) + Send) {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::create_dir(lower.join("dir")).unwrap();
        fs::write(lower.join("dir/big"), (0..LENGTH).map(content).collect::<Vec<_>>()).unwrap();
        let merged = place.overlay("union", &lower);
        let mounted = serve(&place, &merged, &lower);
        test(&mounted, &place);
        mounted.unmount();
        assert_eq!(fs::read(lower.join("dir/big")).unwrap()[..4], [0; 4]);
    });
}

/// Where the turns can be counted.
fn within(place: &Place, merged: &Path, lower: &Path) -> Mounted {
    let lower = lower.to_owned();
    let layers = Layers::open(Some(&place.path("union/upper")), std::slice::from_ref(&lower)).unwrap();
    let server = Server::new(merged).unwrap().with_layers(layers);
    Mounted::serve(
        server,
        Config {
            layers: vec![lower],
            upper: Some(place.path("union/upper")),
            ..Config::new(place.folder("mnt"))
        },
    )
}

/// Where the files can be mapped.
fn apart(place: &Place, merged: &Path, lower: &Path) -> Mounted {
    let layers = Some((place.path("union/upper"), lower.to_owned()));
    let mountpoint = place.folder("mnt");
    Mounted::apart(&Spec { folder: merged, mountpoint: &mountpoint, writes: Writes::Through, layers })
}

fn reads(mounted: &Mounted) -> u64 {
    let of =
        |wanted| mounted.export().turns().iter().find(|(opcode, _)| *opcode == wanted).map_or(0, |(_, n)| *n);
    of(op::READ) + of(op::OPEN_READ)
}

#[test]
fn a_large_lower_file_costs_one_turn() {
    on_layers(within, |mounted, _| {
        let bytes = fs::read(mounted.path("dir/big")).unwrap();
        assert!(bytes.iter().zip(0..).all(|(byte, at)| *byte == content(at)));
        assert_eq!(bytes.len(), LENGTH);
        assert!(reads(mounted) <= 2, "{} reads went to the guest", reads(mounted));
    });
}

#[test]
fn who_reads_sees_what_others_write() {
    on_layers(apart, |mounted, place| {
        let reading = File::open(mounted.path("dir/big")).unwrap();
        let mut bytes = [0; 4];
        reading.read_at(&mut bytes, 0).unwrap();
        let mapped = Shared::of(&reading, LENGTH, false).unwrap();
        assert_eq!(mapped.get(4096), 1);
        let writing = File::options().write(true).open(mounted.path("dir/big")).unwrap();
        writing.write_at(b"new!", 4 << 20).unwrap();
        writing.write_at(b"old?", 0).unwrap();
        reading.read_at(&mut bytes, 4 << 20).unwrap();
        assert_eq!(&bytes, b"new!");
        reading.read_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"old?");
        assert_eq!(mapped.get((4 << 20) + 2), b'w');
        // Not read before the change, and not in the kernel's cache.
        reading.read_at(&mut bytes, 6 << 20).unwrap();
        assert_eq!(bytes[0], content(6 << 20));
        writing.set_len(5 << 20).unwrap();
        assert_eq!(reading.read_at(&mut bytes, 6 << 20).unwrap(), 0);
        drop(writing);
        rustix::fs::sync();
        forget();
        reading.read_at(&mut bytes, 4 << 20).unwrap();
        assert_eq!(&bytes, b"new!");
        assert_eq!(fs::read(place.path("union/upper/dir/big")).unwrap()[4 << 20..(4 << 20) + 4], *b"new!");
    });
}

#[test]
fn truncating_by_name_is_seen_too() {
    on_layers(within, |mounted, _| {
        let reading = File::open(mounted.path("dir/big")).unwrap();
        let mut bytes = [0; 4];
        reading.read_at(&mut bytes, 0).unwrap();
        nix::unistd::truncate(&mounted.path("dir/big"), 2 << 20).unwrap();
        nix::unistd::truncate(&mounted.path("dir/big"), 4 << 20).unwrap();
        assert_eq!(reading.read_at(&mut bytes, 3 << 20).unwrap(), 4);
        assert_eq!(bytes, [0; 4], "bytes beyond the cut came back");
    });
}

#[test]
fn files_of_renamed_folders_are_read_where_they_were() {
    on_layers(within, |mounted, _| {
        fs::rename(mounted.path("dir"), mounted.path("moved")).unwrap();
        let bytes = fs::read(mounted.path("moved/big")).unwrap();
        assert!(bytes.iter().zip(0..).all(|(byte, at)| *byte == content(at)));
        assert!(reads(mounted) <= 2);
    });
}

#[test]
fn a_file_that_was_changed_where_it_is_now_is_not_read_where_it_was() {
    on_layers(within, |mounted, _| {
        fs::rename(mounted.path("dir"), mounted.path("moved")).unwrap();
        let writing = File::options().write(true).open(mounted.path("moved/big")).unwrap();
        writing.write_at(b"new!", 4 << 20).unwrap();
        forget();
        assert_eq!(fs::read(mounted.path("moved/big")).unwrap()[4 << 20..(4 << 20) + 4], *b"new!");
    });
}

#[test]
fn what_nobody_can_change_is_read_by_the_kernel_itself() {
    in_private_namespace(|| {
        let place = Place::new();
        let (top, base) = (place.folder("top"), place.folder("base"));
        let large: Vec<u8> = (0..700_000u32).map(|at| (at % 251) as u8).collect();
        for name in ["large", "listed"] {
            fs::write(base.join(name), &large).unwrap();
        }
        fs::write(base.join("small"), "small").unwrap();
        fs::write(top.join("other"), "").unwrap();
        let merged = place.folder("merged");
        let options = format!("lowerdir={}:{}", top.display(), base.display());
        let options = std::ffi::CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", &merged, "overlay", flags, Some(options.as_c_str())).unwrap();
        let lowers = vec![top, base];
        let server = Server::new(&merged).unwrap().with_layers(Layers::open(None, &lowers).unwrap());
        let restrictions = rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY;
        let config = Config { layers: lowers, restrictions, ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        let reads = || {
            let turns = mounted.export().turns();
            (mounted.export().figures().host_reads, turns.iter().any(|(opcode, _)| *opcode == op::READ))
        };
        let early = File::open(mounted.path("small")).unwrap();
        for name in ["large", "large", "listed"] {
            let (one, other) =
                (File::open(mounted.path(name)).unwrap(), File::open(mounted.path(name)).unwrap());
            for file in [&one, &other] {
                let mut bytes = vec![0; large.len() + 1];
                let mut done = 0;
                while let Ok(count @ 1..) = file.read_at(&mut bytes[done..], done as u64) {
                    done += count;
                }
                assert!(bytes[..done] == large, "{name} holds something else");
            }
            fs::read_dir(&mounted.root).unwrap().for_each(drop);
        }
        assert_eq!(reads(), (0, false));
        assert_eq!(fs::read(mounted.path("small")).unwrap(), b"small");
        drop(early);
        mounted.unmount();
    });
}
