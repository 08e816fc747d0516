//! What an overlay in the guest needs of its upper and work folders.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use virtiofsd::filesystem::{FileSystem, FsOptions, GetxattrReply, ListxattrReply};

use super::rig::{Host, RDWR, assert_errno, no_extensions, root, user};

fn assert_whiteout(path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    assert!(meta.file_type().is_char_device());
    assert_eq!(meta.rdev(), 0);
}

#[test]
fn renames_between_upper_and_work_are_renames() {
    let host = Host::new();
    host.share(|guest| {
        let (upper, work) = (guest.inode("upper"), guest.inode("work"));
        guest.create(work, c"made").unwrap();
        guest.rename((work, c"made"), (upper, c"there"), 0).unwrap();
        guest.create(work, c"other").unwrap();
        guest.rename((work, c"other"), (upper, c"there"), libc::RENAME_EXCHANGE).unwrap();
        guest.rename((work, c"other"), (upper, c"moved"), libc::RENAME_WHITEOUT).unwrap();
        assert_errno(
            guest.rename((upper, c"moved"), (upper, c"there"), libc::RENAME_NOREPLACE),
            libc::EEXIST,
        );
    });
    assert!(host.path("snap/fs/there").is_file());
    assert!(host.path("snap/fs/moved").is_file());
    assert_whiteout(&host.path("snap/work/other"));
}

#[test]
fn whiteouts_and_overlay_marks_reach_the_host() {
    let host = Host::new();
    host.share(|guest| {
        let upper = guest.inode("upper");
        let mode = libc::S_IFCHR | 0o600;
        guest.fs.mknod(root(), upper, c"gone", mode, 0, 0, no_extensions()).unwrap();
        let dir = guest.mkdir(upper, c"opaque").unwrap().inode;
        guest.set_xattr(dir, c"trusted.overlay.opaque").unwrap();
    });
    assert_whiteout(&host.path("snap/fs/gone"));
    let mut value = [0; 8];
    let length =
        rustix::fs::getxattr(host.path("snap/fs/opaque"), "trusted.overlay.opaque", &mut value).unwrap();
    assert_eq!(&value[..length], b"y");
}

#[test]
fn attributes_pass_only_when_known() {
    let host = Host::new();
    rustix::fs::setxattr(host.path("lower/file"), "trusted.host", b"1", rustix::fs::XattrFlags::empty())
        .unwrap();
    rustix::fs::setxattr(host.path("lower/file"), "user.seen", b"1", rustix::fs::XattrFlags::empty())
        .unwrap();
    host.share(|guest| {
        let file = guest.create(guest.inode("upper"), c"file").unwrap().0;
        guest.set_xattr(file, c"user.x").unwrap();
        guest.set_xattr(file, c"trusted.overlay.origin").unwrap();
        assert_errno(guest.set_xattr(file, c"trusted.x"), libc::ENOTSUP);
        assert_errno(guest.set_xattr(file, c"security.ima"), libc::ENOTSUP);
        let lower = guest.inode("lower/0/file");
        assert_errno(guest.fs.getxattr(root(), lower, c"trusted.host", 10), libc::ENOTSUP);
        assert_errno(guest.fs.removexattr(root(), lower, c"trusted.host"), libc::ENOTSUP);
        let names = guest.fs.listxattr(root(), lower, 1000).unwrap();
        assert!(matches!(names, ListxattrReply::Names(names) if names == b"user.seen\0"));
        let value = guest.fs.getxattr(root(), lower, c"user.seen", 10).unwrap();
        assert!(matches!(value, GetxattrReply::Value(value) if value == b"1"));
    });
}

#[test]
fn a_user_can_make_files_where_the_guest_kernel_lets_the_overlay() {
    let host = Host::new();
    fs::set_permissions(host.path("snap/work"), fs::Permissions::from_mode(0o000)).unwrap();
    host.share(|guest| {
        let work = guest.inode("work");
        guest.create_as(user(1000), work, c"file").unwrap();
        guest.fs.mkdir(user(1000), work, c"dir", 0o755, 0, no_extensions()).unwrap();
        // And is nobody else's user afterwards.
        guest.create(work, c"roots").unwrap();
    });
    let owner = |name| fs::metadata(host.path(name)).unwrap().uid();
    assert_eq!(owner("snap/work/file"), 1000);
    assert_eq!(owner("snap/work/dir"), 1000);
    assert_eq!(owner("snap/work/roots"), 0);
}

#[test]
fn set_user_id_bits_are_the_guest_kernels_to_clear() {
    let host = Host::new();
    fs::set_permissions(host.path("vol/file"), fs::Permissions::from_mode(0o6755)).unwrap();
    host.share(|guest| {
        let wanted = guest.fs.init(FsOptions::all()).unwrap();
        assert!(!wanted.intersects(FsOptions::HANDLE_KILLPRIV | FsOptions::HANDLE_KILLPRIV_V2));
        // The guest's root may write without clearing them: the kernel of the guest would send a chmod.
        let file = guest.inode("vol/0/file");
        let (handle, _) = guest.open(file, RDWR).unwrap();
        guest.write((file, handle), "x").unwrap();
    });
    assert_eq!(fs::metadata(host.path("vol/file")).unwrap().mode() & 0o7777, 0o6755);
}
