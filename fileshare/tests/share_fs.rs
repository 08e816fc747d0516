//! The served file system, asked directly: what a hostile guest kernel could send. Needs root, no VM.
//!
//! Each test builds a real share root in a mount namespace of its own thread and pivots into it, as the daemon
//! does, so that the host's mount flags are part of what is tested.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used)]

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::MountPropagationFlags;
use tempfile::TempDir;
use virtiofsd::filesystem::{
    Context, DirectoryIterator, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply,
    OpenOptions, ROOT_ID, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::oslib::{ReadvFlags, WritevFlags};
use vmctr_fileshare::share::fs::{Limits, Places, ShareFs, TopPlaces};
use vmctr_fileshare::share::mounts::{MountError, SHARE, ShareRoot, TOP, VOLUMES};
use vmctr_fileshare::share::sources::Sources;
use vmctr_fileshare::share::{ShareSpec, Top, Volume};

const A_DAY: Duration = Duration::from_secs(86_400);
const RDONLY: u32 = libc::O_RDONLY as u32;
const RDWR: u32 = libc::O_RDWR as u32;

/// Small, so that a test can reach it.
const GUEST_FDS: u64 = 500;

/// Bits of a node ID that stand for the folder around upper and work.
const TOP_BITS: u64 = 1 << 62;

/// The host's side: what is shared, and what the test looks at afterwards.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["lower/sub", "snap/fs", "snap/work", "vol/sub", "readonly"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        fs::write(at("lower/file"), "lower").unwrap();
        fs::write(at("snap/secret"), "secret").unwrap();
        fs::write(at("vol/file"), "volume").unwrap();
        fs::write(at("readonly/file"), "read only").unwrap();
        fs::write(at("single"), "single").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self) -> ShareSpec {
        let volume = |name, read_only| Volume { source: self.path(name), read_only, recursive: true };
        ShareSpec {
            lowers: vec![self.path("lower")],
            top: Top::Overlay { upper: self.path("snap/fs"), work: self.path("snap/work") },
            volumes: vec![volume("vol", false), volume("readonly", true), volume("single", false)],
            ..ShareSpec::new()
        }
    }

    /// Runs `test` inside the share root.
    fn share(&self, test: impl FnOnce(&Guest) + Send) {
        self.share_spec(&self.spec(), test);
    }

    fn share_spec(&self, spec: &ShareSpec, test: impl FnOnce(&Guest) + Send) {
        in_private_namespace(|| test(&Guest::mount(spec)));
    }
}

fn in_private_namespace<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        body()
    };
    std::thread::scope(|scope| scope.spawn(inside).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A guest kernel, as far as the tests need one.
struct Guest {
    fs: ShareFs,
}

impl Guest {
    fn mount(spec: &ShareSpec) -> Self {
        let sources = Sources::open(spec).unwrap();
        let one_filesystem = sources.one_filesystem();
        let mut root = ShareRoot::build(&sources).unwrap();
        drop(sources);
        let proc_self_fd = Some(root.enter().unwrap());
        let top = root.upper.clone().zip(root.work.clone());
        let places = Places {
            share: SHARE.into(),
            top: top.map(|(upper, work)| TopPlaces { parent: TOP.into(), upper, work }),
            volumes: root.has_volumes.then(|| VOLUMES.into()),
        };
        let writable = std::mem::take(&mut root.writable);
        let fs =
            ShareFs::new(&places, Limits { guest_fds: GUEST_FDS, one_filesystem, proc_self_fd, writable })
                .unwrap();
        fs.init(FsOptions::all()).unwrap();
        Self { fs }
    }

    fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.fs.lookup(root(), parent, name)
    }

    /// Walks a path from the FUSE root.
    fn walk(&self, path: &str) -> Entry {
        let mut entry = Entry { inode: ROOT_ID, ..self.lookup(ROOT_ID, c"lower").unwrap() };
        for name in path.split('/') {
            entry = self.lookup(entry.inode, &CString::new(name).unwrap()).unwrap();
            assert_ne!(entry.inode, 0, "{name} of {path} is not there");
        }
        entry
    }

    fn inode(&self, path: &str) -> u64 {
        self.walk(path).inode
    }

    fn create(&self, parent: u64, name: &CStr) -> io::Result<(u64, u64)> {
        self.create_as(root(), parent, name)
    }

    fn create_as(&self, who: Context, parent: u64, name: &CStr) -> io::Result<(u64, u64)> {
        let (entry, handle, _) = self.fs.create(who, parent, name, 0o644, false, RDWR, 0, no_extensions())?;
        Ok((entry.inode, handle.unwrap()))
    }

    fn mkdir(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.fs.mkdir(root(), parent, name, 0o755, 0, no_extensions())
    }

    fn open(&self, inode: u64, flags: u32) -> io::Result<(u64, OpenOptions)> {
        let (handle, options) = self.fs.open(root(), inode, false, flags)?;
        Ok((handle.unwrap(), options))
    }

    fn read(&self, inode: u64) -> String {
        let (handle, _) = self.open(inode, RDONLY).unwrap();
        let mut bytes = Vec::new();
        self.fs.read(root(), inode, handle, Sink(&mut bytes), 4096, 0, None, 0).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    fn write(&self, (inode, handle): (u64, u64), text: &str) -> io::Result<usize> {
        let (who, size) = (root(), u32::try_from(text.len()).unwrap());
        self.fs.write(who, inode, handle, Text(text), size, 0, None, false, false, 0)
    }

    fn rename(&self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> io::Result<()> {
        self.fs.rename(root(), from.0, from.1, to.0, to.1, flags)
    }

    fn chmod(&self, inode: u64) -> io::Result<()> {
        let attr = SetattrIn { mode: 0o777, ..SetattrIn::default() };
        self.fs.setattr(root(), inode, attr, None, SetattrValid::MODE).map(drop)
    }

    fn set_xattr(&self, inode: u64, name: &CStr) -> io::Result<()> {
        self.fs.setxattr(root(), inode, name, b"y", 0, SetxattrFlags::empty())
    }
}

fn user(uid: u32) -> Context {
    Context { uid: uid.into(), gid: uid.into(), pid: 1 }
}

fn root() -> Context {
    user(0)
}

fn no_extensions() -> Extensions {
    Extensions::default()
}

struct Sink<'a>(&'a mut Vec<u8>);

impl ZeroCopyWriter for Sink<'_> {
    fn read_from_file_at(
        &mut self,
        f: &File,
        count: usize,
        off: u64,
        _: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        self.0.resize(count, 0);
        let read = f.read_at(self.0, off)?;
        self.0.truncate(read);
        Ok(read)
    }
}

struct Text<'a>(&'a str);

impl ZeroCopyReader for Text<'_> {
    fn write_to_file_at(
        &mut self,
        f: &File,
        _: usize,
        off: u64,
        _: Option<WritevFlags>,
    ) -> io::Result<usize> {
        f.write_at(self.0.as_bytes(), off)
    }
}

#[track_caller]
fn assert_errno<T>(result: io::Result<T>, errno: i32) {
    let error =
        result.err().unwrap_or_else(|| panic!("succeeded, wanted {}", io::Error::from_raw_os_error(errno)));
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
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

fn assert_whiteout(path: &Path) {
    let meta = fs::symlink_metadata(path).unwrap();
    assert!(meta.file_type().is_char_device());
    assert_eq!(meta.rdev(), 0);
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
fn layers_are_read_only_on_the_host() {
    let host = Host::new();
    host.share(|guest| assert_read_only(guest, guest.inode("lower/0")));
    assert_eq!(fs::read_to_string(host.path("lower/file")).unwrap(), "lower");
    assert_eq!(fs::read_dir(host.path("lower")).unwrap().count(), 2);
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
        guest.fs.read(root(), file, handle, Sink(&mut bytes), 10, 0, None, 0).unwrap();
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

#[test]
fn syncing_the_mount_reaches_the_host() {
    Host::new().share(|guest| {
        guest.fs.syncfs(root(), ROOT_ID).unwrap();
        guest.fs.syncfs(root(), guest.inode("upper")).unwrap();
        guest.fs.syncfs(root(), guest.inode("vol/0")).unwrap();
    });
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
