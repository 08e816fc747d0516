//! What the guest may remember.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use virtiofsd::filesystem::{FileSystem, OpenOptions};

use vmctr_fileshare::share::{ShareSpec, Top, UsedBy};

use super::rig::{A_DAY, Guest, Host, RDONLY, RDWR, assert_errno, root};

#[test]
fn the_guest_remembers_all_but_volumes() {
    Host::new().share(|guest| {
        for path in ["lower/0/file", "upper", "work", "lower/0/sub"] {
            let entry = guest.walk(path);
            assert_eq!((entry.entry_timeout, entry.attr_timeout), (A_DAY, A_DAY), "{path}");
            assert_eq!(guest.fs.getattr(root(), entry.inode, None).unwrap().1, A_DAY, "{path}");
        }
        for path in ["vol/0", "vol/0/file", "vol/0/sub", "vol/1/file", "vol/2"] {
            let entry = guest.walk(path);
            assert_eq!((entry.entry_timeout, entry.attr_timeout), (Duration::ZERO, Duration::ZERO), "{path}");
            assert_eq!(guest.fs.getattr(root(), entry.inode, None).unwrap().1, Duration::ZERO, "{path}");
        }
        let made = guest.mkdir(guest.inode("vol/0"), c"made").unwrap();
        assert_eq!((made.entry_timeout, made.attr_timeout), (Duration::ZERO, Duration::ZERO));
    });
}

#[test]
fn missing_names_are_remembered_outside_volumes() {
    Host::new().share(|guest| {
        for path in ["lower/0", "upper"] {
            let entry = guest.lookup(guest.inode(path), c"missing").unwrap();
            assert_eq!((entry.inode, entry.entry_timeout), (0, A_DAY), "{path}");
        }
        assert_errno(guest.lookup(guest.inode("vol/0"), c"missing"), libc::ENOENT);
        assert_errno(guest.lookup(guest.inode("vol"), c"7"), libc::ENOENT);
    });
}

#[test]
fn contents_are_kept_except_of_volumes() {
    Host::new().share(|guest| {
        let options = |path, flags| guest.open(guest.inode(path), flags).unwrap().1;
        let kept = OpenOptions::KEEP_CACHE | OpenOptions::NOFLUSH;
        assert_eq!(options("lower/0/file", RDONLY), kept);
        // No direct I/O: a shared mapping must be possible.
        assert_eq!(options("vol/0/file", RDONLY), OpenOptions::NOFLUSH);
        assert_eq!(options("vol/0/file", RDWR), OpenOptions::empty());
    });
}

/// As programs of 64 bits open.
const LARGE_FILE: u32 = 0o100_000;

/// As an overlay opens a file for its data.
const DATA: u32 = LARGE_FILE | libc::O_NOATIME as u32;

#[test]
fn a_union_keeps_the_contents_of_layers_only() {
    let host = Host::new();
    fs::write(host.path("snap/fs/changed"), "upper").unwrap();
    let options = |guest: &Guest, path| guest.open(guest.inode(path), RDONLY | DATA).unwrap().1;
    let spec = ShareSpec { used_by: UsedBy::Union, ..host.spec() };
    host.share_spec(&spec, |guest| {
        assert_eq!(options(guest, "lower/0/file"), OpenOptions::KEEP_CACHE | OpenOptions::NOFLUSH);
        assert_eq!(options(guest, "upper/changed"), OpenOptions::DIRECT_IO | OpenOptions::NOFLUSH);
        let upper = guest.walk("upper");
        assert_eq!((upper.entry_timeout, upper.attr_timeout), (A_DAY, A_DAY));
    });
    host.share(|guest| {
        let kept = OpenOptions::KEEP_CACHE | OpenOptions::NOFLUSH;
        assert_eq!(options(guest, "upper/changed"), kept, "a container may map it");
    });
}

#[test]
fn what_a_unions_guest_opens_for_an_ioctl_is_refused_as_the_ioctl_would_be() {
    let host = Host::new();
    let spec = ShareSpec { used_by: UsedBy::Union, ..host.spec() };
    host.share_spec(&spec, |guest| {
        let (file, folder) = (guest.inode("lower/0/file"), guest.inode("lower/0/sub"));
        for flags in [RDONLY, RDONLY | LARGE_FILE] {
            assert_errno(guest.open(file, flags), libc::ENOTTY);
        }
        assert_errno(guest.fs.opendir(root(), folder, RDONLY), libc::ENOTTY);
        guest.fs.opendir(root(), folder, RDONLY | LARGE_FILE).unwrap();
    });
    let read_only = ShareSpec { top: Top::None, ..spec };
    host.share_spec(&read_only, |guest| {
        guest.open(guest.inode("lower/0/file"), RDONLY | LARGE_FILE).unwrap();
    });
    host.share(|guest| {
        // A 32-bit program's way to open for data.
        guest.open(guest.inode("lower/0/file"), RDONLY).unwrap();
        guest.fs.opendir(root(), guest.inode("lower/0/sub"), RDONLY).unwrap();
    });
}

#[test]
fn what_the_host_changes_in_a_volume_shows() {
    let host = Host::new();
    let (file, replacement) = (host.path("vol/file"), host.path("vol/replacement"));
    fs::write(&replacement, "a new one").unwrap();
    let writer = File::options().write(true).open(&file).unwrap();
    let directory = File::open(host.path("vol")).unwrap();
    host.share(move |guest| {
        let folder = guest.inode("vol/0");
        let before = guest.lookup(folder, c"file").unwrap();
        writer.write_all_at(b"changed!", 0).unwrap();
        assert_eq!(guest.fs.getattr(root(), before.inode, None).unwrap().0.size, 8);
        assert_eq!(guest.read(before.inode), "changed!");
        rustix::fs::renameat(&directory, "replacement", &directory, "file").unwrap();
        let after = guest.lookup(folder, c"file").unwrap();
        assert_ne!(after.inode, before.inode);
        assert_eq!(guest.read(after.inode), "a new one");
    });
}
