//! The host's side and a guest kernel, as far as the tests need them.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::mount::MountPropagationFlags;
use tempfile::TempDir;
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, OpenOptions, ROOT_ID, SetattrValid, SetxattrFlags,
    ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::oslib::{ReadvFlags, WritevFlags};
use vmctr_fileshare::share::fs::{Limits, Places, ShareFs, TopPlaces};
use vmctr_fileshare::share::mounts::{SHARE, ShareRoot, TOP, VOLUMES};
use vmctr_fileshare::share::sources::Sources;
use vmctr_fileshare::share::{ShareSpec, Top, Volume};

pub const A_DAY: Duration = Duration::from_secs(86_400);
pub const RDONLY: u32 = libc::O_RDONLY as u32;
pub const RDWR: u32 = libc::O_RDWR as u32;

/// Small, so that a test can reach it.
pub const GUEST_FDS: u64 = 500;

/// Bits of a node ID that stand for the folder around upper and work.
pub const TOP_BITS: u64 = 1 << 62;

/// The host's side: what is shared, and what the test looks at afterwards.
pub struct Host {
    dir: TempDir,
}

impl Host {
    pub fn new() -> Self {
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

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn spec(&self) -> ShareSpec {
        let volume = |name, read_only| Volume { source: self.path(name), read_only, recursive: true };
        ShareSpec {
            lowers: vec![self.path("lower")],
            top: Top::Overlay { upper: self.path("snap/fs"), work: self.path("snap/work") },
            volumes: vec![volume("vol", false), volume("readonly", true), volume("single", false)],
            ..ShareSpec::new()
        }
    }

    /// Runs `test` inside the share root.
    pub fn share(&self, test: impl FnOnce(&Guest) + Send) {
        self.share_spec(&self.spec(), test);
    }

    pub fn share_spec(&self, spec: &ShareSpec, test: impl FnOnce(&Guest) + Send) {
        in_private_namespace(|| test(&Guest::mount(spec)));
    }
}

pub fn in_private_namespace<T: Send>(body: impl FnOnce() -> T + Send) -> T {
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
pub struct Guest {
    pub fs: ShareFs,
}

impl Guest {
    pub fn mount(spec: &ShareSpec) -> Self {
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
        let used_by = spec.used_by;
        let limits = Limits { used_by, guest_fds: GUEST_FDS, one_filesystem, proc_self_fd, writable };
        let fs = ShareFs::new(&places, limits).unwrap();
        fs.init(FsOptions::all()).unwrap();
        Self { fs }
    }

    pub fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.fs.lookup(root(), parent, name)
    }

    /// Walks a path from the FUSE root.
    pub fn walk(&self, path: &str) -> Entry {
        let mut entry = Entry { inode: ROOT_ID, ..self.lookup(ROOT_ID, c"lower").unwrap() };
        for name in path.split('/') {
            entry = self.lookup(entry.inode, &CString::new(name).unwrap()).unwrap();
            assert_ne!(entry.inode, 0, "{name} of {path} is not there");
        }
        entry
    }

    pub fn inode(&self, path: &str) -> u64 {
        self.walk(path).inode
    }

    pub fn create(&self, parent: u64, name: &CStr) -> io::Result<(u64, u64)> {
        self.create_as(root(), parent, name)
    }

    pub fn create_as(&self, who: Context, parent: u64, name: &CStr) -> io::Result<(u64, u64)> {
        let (entry, handle, _) = self.fs.create(who, parent, name, 0o644, false, RDWR, 0, no_extensions())?;
        Ok((entry.inode, handle.unwrap()))
    }

    pub fn mkdir(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.fs.mkdir(root(), parent, name, 0o755, 0, no_extensions())
    }

    pub fn open(&self, inode: u64, flags: u32) -> io::Result<(u64, OpenOptions)> {
        let (handle, options) = self.fs.open(root(), inode, false, flags)?;
        Ok((handle.unwrap(), options))
    }

    pub fn read(&self, inode: u64) -> String {
        let (handle, _) = self.open(inode, RDONLY).unwrap();
        let mut bytes = Vec::new();
        self.fs.read(root(), inode, handle, Sink(&mut bytes), 4096, 0, None, 0).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    pub fn write(&self, (inode, handle): (u64, u64), text: &str) -> io::Result<usize> {
        let (who, size) = (root(), u32::try_from(text.len()).unwrap());
        self.fs.write(who, inode, handle, Text(text), size, 0, None, false, false, 0)
    }

    pub fn rename(&self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> io::Result<()> {
        self.fs.rename(root(), from.0, from.1, to.0, to.1, flags)
    }

    pub fn chmod(&self, inode: u64) -> io::Result<()> {
        let attr = SetattrIn { mode: 0o777, ..SetattrIn::default() };
        self.fs.setattr(root(), inode, attr, None, SetattrValid::MODE).map(drop)
    }

    pub fn set_xattr(&self, inode: u64, name: &CStr) -> io::Result<()> {
        self.fs.setxattr(root(), inode, name, b"y", 0, SetxattrFlags::empty())
    }
}

pub fn user(uid: u32) -> Context {
    Context { uid: uid.into(), gid: uid.into(), pid: 1 }
}

pub fn root() -> Context {
    user(0)
}

pub fn no_extensions() -> Extensions {
    Extensions::default()
}

pub struct Sink<'a>(pub &'a mut Vec<u8>);

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

pub struct Text<'a>(&'a str);

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
pub fn assert_errno<T>(result: io::Result<T>, errno: i32) {
    let error =
        result.err().unwrap_or_else(|| panic!("succeeded, wanted {}", io::Error::from_raw_os_error(errno)));
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
}
