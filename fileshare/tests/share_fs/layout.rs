//! What the guest finds where, and what of it may be written.

use std::fs;

use virtiofsd::filesystem::{DirectoryIterator, FileSystem, ROOT_ID};
use vmctr_fileshare::share::mounts::{MountError, ShareRoot};
use vmctr_fileshare::share::sources::Sources;
use vmctr_fileshare::share::{ShareSpec, Top, Volume};

use super::rig::{Guest, Host, RDONLY, RDWR, TOP_BITS, assert_errno, in_private_namespace, root};

fn assert_read_only(guest: &Guest, folder: u64) {
    let file = guest.lookup(folder, c"file").unwrap().inode;
    assert_errno(guest.create(folder, c"new"), libc::EROFS);
    assert_errno(guest.mkdir(folder, c"new"), libc::EROFS);
    assert_errno(guest.open(file, RDWR), libc::EROFS);
    assert_errno(guest.open(file, RDONLY | libc::O_TRUNC as u32), libc::EROFS);
    assert_errno(guest.chmod(file), libc::EROFS);
    assert_errno(guest.set_xattr(file, c"user.x"), libc::EROFS);
    assert_errno(guest.fs.unlink(root(), folder, c"file"), libc::EROFS);
    assert_errno(guest.rename((folder, c"file"), (folder, c"g"), 0), libc::EROFS);
    assert_errno(guest.fs.link(root(), file, folder, c"g"), libc::EROFS);
}

#[test]
fn the_root_shows_what_is_shared() {
    Host::new().share(|guest| {
        let (handle, _) = guest.fs.opendir(root(), ROOT_ID, RDONLY).unwrap();
        let mut entries = guest.fs.readdir(root(), ROOT_ID, handle.unwrap(), 4096, 0).unwrap();
        let mut names = Vec::new();
        while let Some(entry) = entries.next() {
            names.push(entry.name.to_str().unwrap().to_owned());
        }
        names.sort();
        assert_eq!(names, [".", "..", "lower", "upper", "vol", "work"]);
        // What readdirplus would do.
        for name in ["lower", "upper", "vol", "work"] {
            guest.inode(name);
        }
        assert_eq!(guest.read(guest.inode("lower/0/file")), "lower");
        assert_eq!(guest.read(guest.inode("vol/0/file")), "volume");
        assert_eq!(guest.read(guest.inode("vol/2")), "single");
    });
}

#[test]
fn upper_may_lie_deeper_than_work() {
    let host = Host::new();
    fs::create_dir_all(host.path("snap/a/b/fs")).unwrap();
    let top = Top::Overlay { upper: host.path("snap/a/b/fs"), work: host.path("snap/work") };
    host.share_spec(&ShareSpec { top, ..host.spec() }, |guest| {
        guest.create(guest.inode("work"), c"made").unwrap();
        guest.rename((guest.inode("work"), c"made"), (guest.inode("upper"), c"made"), 0).unwrap();
    });
    assert!(host.path("snap/a/b/fs/made").is_file());
}

#[test]
fn a_share_without_upper_and_volumes_has_none() {
    let host = Host::new();
    let spec = ShareSpec { lowers: vec![host.path("lower")], ..ShareSpec::new() };
    host.share_spec(&spec, |guest| {
        for name in [c"upper", c"work", c"vol", c"root"] {
            assert_eq!(guest.lookup(ROOT_ID, name).unwrap().inode, 0);
        }
        assert_errno(guest.fs.getattr(root(), TOP_BITS | 2, None), libc::EBADF);
        assert_eq!(guest.read(guest.inode("lower/0/file")), "lower");
    });
}

#[test]
fn a_plain_folder_can_be_the_root() {
    let host = Host::new();
    let top = Top::Folder { path: host.path("vol"), read_only: false };
    host.share_spec(&ShareSpec { top, ..ShareSpec::new() }, |guest| {
        guest.create(guest.inode("root"), c"new").unwrap();
    });
    assert!(host.path("vol/new").exists());
}
#[test]
fn a_mount_between_parent_and_upper_is_refused() {
    let host = Host::new();
    let error = in_private_namespace(|| {
        // The same file system, but another mount: renames out of it would fail.
        let bind = nix::mount::MsFlags::MS_BIND;
        let upper = host.path("snap/fs");
        nix::mount::mount(Some(&host.path("lower")), &upper, None::<&str>, bind, None::<&str>).unwrap();
        ShareRoot::build(&Sources::open(&host.spec()).unwrap()).unwrap_err()
    });
    assert!(
        matches!(&error, MountError::OtherMount { path, .. } if *path == host.path("snap/fs")),
        "{error}"
    );
}

#[test]
fn recursion_takes_nested_mounts_along_and_makes_them_read_only_too() {
    let host = Host::new();
    fs::create_dir(host.path("vol/nested")).unwrap();
    let volume = |read_only, recursive| Volume { source: host.path("vol"), read_only, recursive };
    let volumes = vec![volume(true, true), volume(false, true), volume(false, false)];
    let spec = ShareSpec { volumes, ..ShareSpec::new() };
    in_private_namespace(|| {
        let nested = host.path("vol/nested");
        nix::mount::mount(Some("t"), &nested, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
            .unwrap();
        fs::write(nested.join("file"), "nested").unwrap();
        let guest = Guest::mount(&spec);
        assert_read_only(&guest, guest.inode("vol/0/nested"));
        guest.create(guest.inode("vol/1/nested"), c"new").unwrap();
        // Without recursion there is the folder that the mount covers on the host.
        let covered = guest.inode("vol/2/nested");
        assert_errno(guest.lookup(covered, c"file"), libc::ENOENT);
    });
}

/// The share root is put together over a folder of the host before it is entered.
#[test]
fn a_volume_does_not_show_the_share_root_in_the_making() {
    let host = Host::new();
    let volume = |source: &str| Volume { source: source.into(), read_only: true, recursive: true };
    let spec = ShareSpec { volumes: vec![volume("/proc"), volume("/")], ..host.spec() };
    host.share_spec(&spec, |guest| {
        for folder in ["vol/0", "vol/1/proc"] {
            let folder = guest.inode(folder);
            assert_ne!(guest.lookup(folder, c"uptime").unwrap().inode, 0);
            for name in [c"top", c"share"] {
                assert_errno(guest.lookup(folder, name), libc::ENOENT);
            }
        }
    });
}

#[test]
fn volumes_are_as_writable_as_asked_for() {
    let host = Host::new();
    host.share(|guest| {
        assert_read_only(guest, guest.inode("vol/1"));
        let file = guest.create(guest.inode("vol/0"), c"new").unwrap();
        guest.write(file, "from the guest").unwrap();
        let single = guest.inode("vol/2");
        let (handle, _) = guest.open(single, RDWR).unwrap();
        guest.write((single, handle), "SINGLE").unwrap();
    });
    assert_eq!(fs::read_to_string(host.path("vol/new")).unwrap(), "from the guest");
    assert_eq!(fs::read_to_string(host.path("single")).unwrap(), "SINGLE");
}

#[test]
fn layers_are_read_only_on_the_host() {
    let host = Host::new();
    host.share(|guest| assert_read_only(guest, guest.inode("lower/0")));
    assert_eq!(fs::read_to_string(host.path("lower/file")).unwrap(), "lower");
    assert_eq!(fs::read_dir(host.path("lower")).unwrap().count(), 2);
}

#[test]
fn syncing_the_mount_reaches_the_host() {
    Host::new().share(|guest| {
        guest.fs.syncfs(root(), ROOT_ID).unwrap();
        guest.fs.syncfs(root(), guest.inode("upper")).unwrap();
        guest.fs.syncfs(root(), guest.inode("vol/0")).unwrap();
    });
}
