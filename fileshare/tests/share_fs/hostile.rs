//! What no guest may do, however it asks.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;

use virtiofsd::filesystem::{FileSystem, ROOT_ID, SetattrValid};
use virtiofsd::fuse::SetattrIn;

use super::rig::{self, GUEST_FDS, Host, RDONLY, RDWR, TOP_BITS, assert_errno, no_extensions, root};

#[test]
fn what_lies_around_upper_and_work_cannot_be_reached() {
    Host::new().share(|guest| {
        let upper = guest.inode("upper");
        for name in [c"..", c".", c"../secret", c"../work", c"", c"/"] {
            assert_errno(guest.lookup(upper, name), libc::EINVAL);
        }
        for name in [c"top", c"secret", c"snap", c"proc"] {
            assert_eq!(guest.lookup(ROOT_ID, name).unwrap().inode, 0);
        }
        assert_errno(guest.lookup(ROOT_ID, c"upper/../secret"), libc::EINVAL);
        let hidden = TOP_BITS | ROOT_ID;
        assert_errno(guest.lookup(hidden, c"secret"), libc::EBADF);
        assert_errno(guest.fs.getattr(root(), hidden, None), libc::EBADF);
        assert_errno(guest.fs.opendir(root(), hidden, RDONLY), libc::EBADF);
        assert_errno(guest.create(hidden, c"x"), libc::EBADF);
        assert_errno(guest.fs.statfs(root(), hidden), libc::EBADF);
        assert_errno(guest.fs.syncfs(root(), hidden), libc::EBADF);
        assert_errno(guest.fs.link(root(), guest.inode("upper"), hidden, c"x"), libc::EBADF);
        assert_errno(guest.rename((hidden, c"secret"), (upper, c"x"), 0), libc::EBADF);
        assert_errno(guest.rename((upper, c"x"), (hidden, c"secret"), 0), libc::EBADF);
    });
}

#[test]
fn no_guessed_node_is_the_folder_around_upper_and_work() {
    let host = Host::new();
    let around = fs::metadata(host.path("snap")).unwrap().ino();
    host.share(|guest| {
        let known = [guest.inode("upper"), guest.inode("work")];
        for area in 0..4_u64 {
            for inode in 0..100 {
                let id = area << 62 | inode;
                if let Ok((attr, _)) = guest.fs.getattr(root(), id, None) {
                    assert_ne!(attr.ino, around, "node {id:x}");
                    assert!(area != 1 || known.contains(&id), "node {id:x}");
                }
            }
        }
    });
}

#[test]
fn names_are_single_components_in_every_request() {
    Host::new().share(|guest| {
        let upper = guest.inode("upper");
        let file = guest.create(upper, c"f").unwrap().0;
        for bad in [c"..", c"../secret", c"a/b", c""] {
            let ext = no_extensions;
            assert_errno(guest.create(upper, bad), libc::EINVAL);
            assert_errno(guest.mkdir(upper, bad), libc::EINVAL);
            assert_errno(guest.fs.mknod(root(), upper, bad, libc::S_IFREG, 0, 0, ext()), libc::EINVAL);
            assert_errno(guest.fs.symlink(root(), c"target", upper, bad, ext()), libc::EINVAL);
            assert_errno(guest.fs.unlink(root(), upper, bad), libc::EINVAL);
            assert_errno(guest.fs.rmdir(root(), upper, bad), libc::EINVAL);
            assert_errno(guest.fs.link(root(), file, upper, bad), libc::EINVAL);
            assert_errno(guest.rename((upper, bad), (upper, c"g"), 0), libc::EINVAL);
            assert_errno(guest.rename((upper, c"f"), (upper, bad), 0), libc::EINVAL);
        }
    });
}

#[test]
fn roots_do_not_change() {
    let host = Host::new();
    host.share(|guest| {
        for folder in [ROOT_ID, guest.inode("lower"), guest.inode("vol")] {
            assert_errno(guest.create(folder, c"new"), libc::EROFS);
            assert_errno(guest.mkdir(folder, c"new"), libc::EROFS);
            assert_errno(guest.chmod(folder), libc::EROFS);
            assert_errno(guest.set_xattr(folder, c"user.x"), libc::EROFS);
            assert_errno(guest.fs.removexattr(root(), folder, c"user.x"), libc::EROFS);
        }
        let upper = guest.inode("upper");
        for name in [c"upper", c"work", c"lower", c"vol"] {
            assert_errno(guest.fs.rmdir(root(), ROOT_ID, name), libc::EROFS);
            assert_errno(guest.fs.unlink(root(), ROOT_ID, name), libc::EROFS);
            assert_errno(guest.rename((ROOT_ID, name), (upper, c"x"), 0), libc::EROFS);
            assert_errno(guest.rename((upper, c"x"), (ROOT_ID, name), 0), libc::EROFS);
        }
    });
    assert!(host.path("snap/fs").is_dir() && host.path("snap/work").is_dir());
}

#[test]
fn special_files_are_made_but_never_opened() {
    Host::new().share(|guest| {
        let upper = guest.inode("upper");
        let null = 1 << 8 | 3;
        let kinds =
            [(c"fifo", libc::S_IFIFO, 0), (c"null", libc::S_IFCHR, null), (c"socket", libc::S_IFSOCK, 0)];
        for (name, kind, device) in kinds {
            let made = guest.fs.mknod(root(), upper, name, kind | 0o666, device, 0, no_extensions()).unwrap();
            for flags in [RDONLY, RDWR, RDONLY | libc::O_NONBLOCK as u32] {
                assert_errno(guest.open(made.inode, flags), libc::EBADF);
            }
            // Nor by way of creating what is there already.
            assert_errno(guest.create(upper, name), libc::EBADF);
            let size = SetattrIn { size: 1, ..SetattrIn::default() };
            let truncated = guest.fs.setattr(root(), made.inode, size, None, SetattrValid::SIZE);
            assert_errno(truncated, libc::EBADF);
            guest.fs.unlink(root(), upper, name).unwrap();
        }
    });
}

#[test]
fn flags_that_make_files_or_other_descriptors_are_dropped() {
    let host = Host::new();
    host.share(|guest| {
        let upper = guest.inode("upper");
        // O_TMPFILE would make an unnamed file that no limit on names counts; the folder is opened instead,
        // and that not for writing.
        assert_errno(guest.open(upper, RDWR | libc::O_TMPFILE as u32), libc::EISDIR);
        let file = guest.create(upper, c"file").unwrap().0;
        let (handle, _) = guest.open(file, RDONLY | libc::O_PATH as u32).unwrap();
        let mut bytes = Vec::new();
        guest.fs.read(root(), file, handle, rig::Sink(&mut bytes), 10, 0, None, 0).unwrap();
    });
}

#[test]
fn handles_belong_to_their_node() {
    Host::new().share(|guest| {
        let upper = guest.inode("upper");
        let (a, b) = (guest.create(upper, c"a").unwrap(), guest.create(upper, c"b").unwrap());
        assert_errno(guest.write((a.0, b.1), "x"), libc::EBADF);
        assert_errno(guest.write((guest.inode("vol/0/file"), a.1), "x"), libc::EBADF);
    });
}

#[test]
fn nothing_is_joined_across_parts() {
    Host::new().share(|guest| {
        let (upper, volume) = (guest.inode("upper"), guest.inode("vol/0"));
        let file = guest.create(upper, c"file").unwrap();
        assert_errno(guest.rename((upper, c"file"), (volume, c"file"), 0), libc::EXDEV);
        assert_errno(guest.rename((volume, c"file"), (upper, c"file"), libc::RENAME_EXCHANGE), libc::EXDEV);
        assert_errno(guest.fs.link(root(), file.0, volume, c"link"), libc::EXDEV);
        assert_errno(guest.fs.link(root(), guest.inode("lower/0/file"), upper, c"link"), libc::EXDEV);
        let target = guest.create(volume, c"copy").unwrap();
        let copied = guest.fs.copyfilerange(root(), file.0, file.1, 0, target.0, target.1, 0, 1, 0);
        assert_errno(copied, libc::EXDEV);
    });
}

#[test]
fn roots_survive_being_forgotten() {
    Host::new().share(|guest| {
        let volumes = guest.inode("vol");
        let hidden = TOP_BITS | ROOT_ID;
        for id in [ROOT_ID, volumes, hidden, 0, u64::MAX] {
            guest.fs.forget(root(), id, u64::MAX);
        }
        guest.fs.batch_forget(root(), vec![(ROOT_ID, 9), (volumes, 9), (hidden, 9)]);
        guest.create(guest.inode("upper"), c"file").unwrap();
        guest.inode("vol/0/file");
        guest.inode("lower/0/file");
    });
}

#[test]
fn forgotten_nodes_are_gone() {
    Host::new().share(|guest| {
        for path in ["lower/0/file", "vol/0/file", "upper"] {
            let inode = guest.inode(path);
            guest.fs.forget(root(), inode, 1);
            assert_errno(guest.fs.getattr(root(), inode, None), libc::EBADF);
        }
    });
}

#[test]
fn the_descriptors_that_a_guest_may_hold_are_bounded() {
    Host::new().share(|guest| {
        let upper = guest.inode("upper");
        let mut held = Vec::new();
        let refused = loop {
            match guest.create(upper, &CString::new(format!("f{}", held.len())).unwrap()) {
                Ok(file) => held.push(file),
                Err(error) => break error,
            }
        };
        assert_eq!(refused.raw_os_error(), Some(libc::ENFILE));
        assert!((held.len() as u64) < GUEST_FDS);
        for (inode, handle) in held.drain(..2) {
            guest.fs.release(root(), inode, 0, handle, false, false, None).unwrap();
            guest.fs.forget(root(), inode, 1);
        }
        guest.create(upper, c"one-more").unwrap();
    });
}
