//! A guest's folder and its mount, for a test to work on.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use tempfile::TempDir;
use vmctr_fileshare::export::guest::Server;
use vmctr_fileshare::export::host::{Config, Export, Streams, Writes, unmount};
use vmctr_fileshare::export::wire::stream::Stream;

use super::apart::{self, Spec};

/// As many relay threads as the tests use.
const LANES: usize = 4;

/// Runs `body` where it may mount without anybody seeing.
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

/// Folders for a test, on a disk file system.
pub struct Place {
    dir: TempDir,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A folder, made if it is not there.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Mounts an overlay as the guest does.
    pub fn overlay(&self, name: &str, lower: &Path) -> PathBuf {
        self.overlay_by(name, lower, UNION)
    }

    /// An overlay with other options.
    pub fn overlay_by(&self, name: &str, lower: &Path, how: &str) -> PathBuf {
        let merged = self.folder(&format!("{name}/merged"));
        let (upper, work) = (self.folder(&format!("{name}/upper")), self.folder(&format!("{name}/work")));
        mount_overlay_by(&merged, lower, (&upper, &work), how);
        merged
    }
}

impl Drop for Place {
    /// What is still mounted there could not be removed.
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap_or_default();
        let below = |line: &str| line.split(' ').nth(1).map(PathBuf::from);
        for mount in mounts.lines().rev().filter_map(below).filter(|path| path.starts_with(self.dir.path())) {
            let _ = rustix::mount::unmount(&mount, UnmountFlags::DETACH);
        }
    }
}

/// The options that unions have.
const UNION: &str = "index=off,redirect_dir=on,metacopy=off,uuid=off,xino=on";

/// Those of an overlay that keeps a file's names together when it copies it up.
pub const INDEXED: &str = "index=on,redirect_dir=on,metacopy=off";

pub fn mount_overlay(merged: &Path, lower: &Path, upper: &Path, work: &Path) {
    mount_overlay_by(merged, lower, (upper, work), UNION);
}

fn mount_overlay_by(merged: &Path, lower: &Path, (upper, work): (&Path, &Path), how: &str) {
    let options =
        format!("lowerdir={},upperdir={},workdir={},{how}", lower.display(), upper.display(), work.display());
    let options = CString::new(options).unwrap();
    rustix::mount::mount("overlay", merged, "overlay", MountFlags::empty(), Some(options.as_c_str()))
        .unwrap();
}

pub fn mount_tmpfs(at: &Path, options: &str) {
    let options = CString::new(options).unwrap();
    rustix::mount::mount("tmpfs", at, "tmpfs", MountFlags::empty(), Some(options.as_c_str())).unwrap();
}

/// A served folder, mounted.
pub struct Mounted {
    pub root: PathBuf,
    by: By,
    ended: bool,
}

/// Who serves it.
enum By {
    Threads(Option<Export>, Vec<JoinHandle<()>>),
    Process {
        child: Child,
        /// Kept, for the process ends with it, and waiting for a process closes its input.
        _input: ChildStdin,
    },
}

impl Mounted {
    /// Serves `folder` from another process and mounts it on `mountpoint`.
    pub fn new(folder: &Path, mountpoint: &Path) -> Self {
        Self::apart(&Spec { folder, mountpoint, writes: Writes::Through, layers: None })
    }

    /// The same of an overlay over `lower`, whose upper files are lent to the host.
    pub fn lending(place: &Place, name: &str, lower: &Path) -> Self {
        let (folder, mountpoint) = (place.overlay(name, lower), place.folder("mnt"));
        let layers = Some((place.path(&format!("{name}/upper")), lower.to_owned()));
        Self::apart(&Spec { folder: &folder, mountpoint: &mountpoint, writes: Writes::Through, layers })
    }

    pub fn apart(spec: &Spec<'_>) -> Self {
        let mut child = apart::start(spec);
        let _input = child.stdin.take().unwrap();
        Self { root: spec.mountpoint.to_owned(), by: By::Process { child, _input }, ended: false }
    }

    /// Serves `folder` from this process, for who wants to look into the relay.
    pub fn within(folder: &Path, config: Config) -> Self {
        Self::serve(Server::new(folder).unwrap(), config)
    }

    pub fn serve(server: Server, config: Config) -> Self {
        let server = Arc::new(server);
        let mut serving = Vec::new();
        let mut stream = || {
            let (ours, theirs) = Stream::pair().unwrap();
            let server = Arc::clone(&server);
            serving.push(std::thread::spawn(move || server.serve(theirs).unwrap()));
            ours
        };
        let streams = Streams { turns: (0..LANES).map(|_| stream()).collect(), waits: stream() };
        let export = Export::start(&config, streams).unwrap();
        Self { root: config.mountpoint, by: By::Threads(Some(export), serving), ended: false }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn export(&self) -> &Export {
        match &self.by {
            By::Threads(export, _) => export.as_ref().unwrap(),
            By::Process { .. } => panic!("the relay is another process's"),
        }
    }

    /// Takes the mount away and waits for the end of who serves it.
    pub fn unmount(mut self) {
        take_away(&self.root);
        self.end();
    }

    /// Waits until somebody takes the mount away.
    pub fn wait(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.ended = true;
        match &mut self.by {
            By::Threads(export, serving) => {
                assert_eq!(export.take().unwrap().wait(), None);
                serving.drain(..).for_each(|thread| thread.join().unwrap());
            }
            By::Process { child, .. } => assert!(child.wait().unwrap().success()),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let _ = rustix::mount::unmount(&self.root, UnmountFlags::DETACH);
        if let By::Process { child, .. } = &mut self.by {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Unmounts. Another test that is just starting a process holds all descriptors for a moment.
pub fn take_away(root: &Path) {
    let until = Instant::now() + Duration::from_secs(5);
    while let Err(error) = unmount(root, false) {
        assert!(error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until, "{error}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs `body` as a user, as far as file systems ask.
pub fn as_user<T: Send>(uid: u32, groups: &[u32], body: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        let groups: Vec<_> = groups.iter().map(|gid| rustix::thread::Gid::from_raw(*gid)).collect();
        rustix::thread::set_thread_groups(&groups).unwrap();
        nix::unistd::setfsgid(uid.into());
        nix::unistd::setfsuid(uid.into());
        body()
    };
    on_thread(inside)
}

/// Runs `body` with open files of its own, which is what makes a process to locks.
pub fn as_other_process<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    on_thread(|| {
        super::sys::own_descriptors();
        body()
    })
}

pub fn on_thread<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(body).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[track_caller]
pub fn assert_errno<T>(result: std::io::Result<T>, errno: i32) {
    let error = result.err().unwrap_or_else(|| panic!("succeeded, wanted errno {errno}"));
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
}

/// Waits until the kernel knows fewer files than so many.
pub fn eventually_fewer(mounted: &Mounted, most: u64) {
    eventually("fewer files", || mounted.export().figures().nodes < most);
}

/// Waits until it is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < until, "no {what} after 10 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}
