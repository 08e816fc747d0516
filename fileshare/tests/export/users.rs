//! What other users may do, and what becomes of set-ID bits: as a kernel overlay has it.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;

use super::rig::{Mounted, Place, as_user, assert_errno, in_private_namespace};

const ALICE: u32 = 1001;
const BOB: u32 = 1002;
const TEAM: u32 = 2000;

/// Runs a test on a kernel overlay, which proves the test, then on ours over another one, without files that are
/// lent to the host and with them.
fn on_both(test: impl Fn(&Path) + Send + Sync) {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fs::write(lower.join("private"), "secret").unwrap();
        fs::set_permissions(lower.join("private"), Permissions::from_mode(0o600)).unwrap();
        fs::write(lower.join("program"), "x").unwrap();
        fs::set_permissions(lower.join("program"), Permissions::from_mode(0o6777)).unwrap();
        let kernel = place.overlay("kernel", &lower);
        run(&kernel, &test);
        let mounted = Mounted::new(&place.overlay("ours", &lower), &place.folder("mnt"));
        run(&mounted.root, &test);
        mounted.unmount();
        let mounted = Mounted::lending(&place, "lent", &lower);
        run(&mounted.root, &test);
        mounted.unmount();
    });
}

fn run(root: &Path, test: impl Fn(&Path)) {
    fs::set_permissions(root, Permissions::from_mode(0o755)).unwrap();
    test(root);
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn permissions_hold() {
    on_both(|root| {
        as_user(ALICE, &[], || {
            assert_errno(fs::read(root.join("private")), libc::EACCES);
            assert_errno(fs::write(root.join("new"), ""), libc::EACCES);
            assert_errno(fs::remove_file(root.join("private")), libc::EACCES);
            assert_errno(
                fs::set_permissions(root.join("private"), Permissions::from_mode(0o777)),
                libc::EPERM,
            );
        });
        assert_eq!(fs::read(root.join("private")).unwrap(), b"secret");
    });
}

#[test]
fn what_a_user_makes_is_the_user_s() {
    on_both(|root| {
        let open = root.join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
        as_user(ALICE, &[], || {
            fs::write(open.join("file"), "hers").unwrap();
            fs::create_dir(open.join("dir")).unwrap();
            std::os::unix::fs::symlink("x", open.join("link")).unwrap();
        });
        for name in ["file", "dir", "link"] {
            let meta = fs::symlink_metadata(open.join(name)).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (ALICE, ALICE), "{name}");
        }
        as_user(BOB, &[], || assert_errno(fs::write(open.join("file"), "his"), libc::EACCES));
    });
}

#[test]
fn sticky_folders_keep_files_from_others() {
    on_both(|root| {
        let tmp = root.join("tmp");
        fs::create_dir(&tmp).unwrap();
        fs::set_permissions(&tmp, Permissions::from_mode(0o1777)).unwrap();
        as_user(ALICE, &[], || fs::write(tmp.join("hers"), "").unwrap());
        as_user(BOB, &[], || {
            assert_errno(fs::remove_file(tmp.join("hers")), libc::EPERM);
            assert_errno(fs::rename(tmp.join("hers"), tmp.join("his")), libc::EPERM);
        });
        as_user(ALICE, &[], || fs::remove_file(tmp.join("hers")).unwrap());
    });
}

#[test]
fn set_group_folders_pass_their_group_on() {
    on_both(|root| {
        let team = root.join("team");
        fs::create_dir(&team).unwrap();
        chown(&team, Some(ALICE), Some(TEAM)).unwrap();
        fs::set_permissions(&team, Permissions::from_mode(0o2777)).unwrap();
        as_user(ALICE, &[TEAM], || {
            fs::write(team.join("file"), "").unwrap();
            fs::create_dir(team.join("dir")).unwrap();
            let open = File::options().write(true).create(true).truncate(true).to_owned();
            use std::os::unix::fs::OpenOptionsExt;
            open.clone().mode(0o2775).open(team.join("member")).unwrap();
        });
        as_user(BOB, &[], || {
            use std::os::unix::fs::OpenOptionsExt;
            File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o2775)
                .open(team.join("stranger"))
                .unwrap();
        });
        assert_eq!(fs::metadata(team.join("file")).unwrap().gid(), TEAM);
        assert_eq!(
            (fs::metadata(team.join("dir")).unwrap().gid(), mode(&team.join("dir")) & 0o2000),
            (TEAM, 0o2000)
        );
        assert_eq!(mode(&team.join("member")) & 0o2000, 0o2000);
        assert_eq!(mode(&team.join("stranger")) & 0o2000, 0);
    });
}

#[test]
fn writing_clears_set_id_bits_and_capabilities() {
    on_both(|root| {
        let program = root.join("program");
        let arm = || {
            fs::set_permissions(&program, Permissions::from_mode(0o6777)).unwrap();
            let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(&program, "security.capability", &capability, flags).unwrap();
            assert_eq!(mode(&program), 0o6777);
        };
        let armed = || {
            let capability = rustix::fs::getxattr(&program, "security.capability", &mut [0; 32]).is_ok();
            (mode(&program), capability)
        };
        arm();
        as_user(ALICE, &[], || {
            File::options().write(true).open(&program).unwrap().write_at(b"y", 0).unwrap();
        });
        assert_eq!(armed(), (0o777, false), "write");
        arm();
        as_user(ALICE, &[], || File::options().write(true).open(&program).unwrap().set_len(3).unwrap());
        assert_eq!(armed(), (0o777, false), "truncate");
        arm();
        as_user(ALICE, &[], || drop(File::options().write(true).truncate(true).open(&program).unwrap()));
        assert_eq!(armed(), (0o777, false), "open to truncate");
        arm();
        chown(&program, Some(ALICE), None).unwrap();
        assert_eq!(armed(), (0o777, false), "chown");
        chown(&program, Some(0), None).unwrap();
    });
}

#[test]
fn a_folder_s_acl_lets_others_make_files_there() {
    on_both(|root| {
        let mut acl = vec![2, 0, 0, 0];
        for (tag, perm, id) in
            [(1u16, 7u16, u32::MAX), (4, 0, u32::MAX), (8, 7, TEAM), (16, 7, u32::MAX), (32, 0, u32::MAX)]
        {
            acl.extend_from_slice(&tag.to_le_bytes());
            acl.extend_from_slice(&perm.to_le_bytes());
            acl.extend_from_slice(&id.to_le_bytes());
        }
        let dir = root.join("shared");
        fs::create_dir(&dir).unwrap();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&dir, "system.posix_acl_access", &acl, flags).unwrap();
        as_user(ALICE, &[TEAM], || {
            fs::write(dir.join("file"), "hers").unwrap();
            fs::create_dir(dir.join("dir")).unwrap();
            std::os::unix::fs::symlink("x", dir.join("link")).unwrap();
        });
        assert_eq!(fs::metadata(dir.join("file")).unwrap().uid(), ALICE);
        as_user(BOB, &[], || assert_errno(fs::write(dir.join("his"), ""), libc::EACCES));
    });
}

#[test]
fn a_mask_and_default_acls_shape_new_modes() {
    on_both(|root| {
        // Default ACL: user rwx, group r-x, mask rwx, other r--; a named user 1001 with rwx.
        let mut acl = vec![2, 0, 0, 0];
        for (tag, perm, id) in
            [(1u16, 7u16, u32::MAX), (2, 7, ALICE), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 4, u32::MAX)]
        {
            acl.extend_from_slice(&tag.to_le_bytes());
            acl.extend_from_slice(&perm.to_le_bytes());
            acl.extend_from_slice(&id.to_le_bytes());
        }
        let flags = rustix::fs::XattrFlags::empty();
        let dir = root.join("acl");
        fs::create_dir(&dir).unwrap();
        rustix::fs::setxattr(&dir, "system.posix_acl_default", &acl, flags).unwrap();
        rustix::fs::setxattr(&dir, "system.posix_acl_access", &acl, flags).unwrap();
        as_user(ALICE, &[], || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
            fs::write(dir.join("new"), "").unwrap();
        });
        // The default ACL, not the umask, decides: 0666 within it.
        assert_eq!(mode(&dir.join("new")), 0o664);
        assert!(rustix::fs::getxattr(dir.join("new"), "system.posix_acl_access", &mut [0; 64]).is_ok());
        as_user(BOB, &[], || assert_errno(fs::write(dir.join("other"), ""), libc::EACCES));
        let plain = root.join("plain");
        fs::create_dir(&plain).unwrap();
        fs::set_permissions(&plain, Permissions::from_mode(0o777)).unwrap();
        as_user(ALICE, &[], || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o027));
            fs::write(plain.join("new"), "").unwrap();
        });
        assert_eq!(mode(&plain.join("new")), 0o640);
    });
}
