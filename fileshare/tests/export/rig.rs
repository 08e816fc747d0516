//! A guest's folder and its mount, for a test to work on.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use tempfile::TempDir;
use vmctr_fileshare::export::guest::Server;
use vmctr_fileshare::export::host::{Config, Export, Lost, Streams, unmount};
use vmctr_fileshare::export::wire::stream::Stream;

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
        let merged = self.folder(&format!("{name}/merged"));
        let (upper, work) = (self.folder(&format!("{name}/upper")), self.folder(&format!("{name}/work")));
        mount_overlay(&merged, lower, &upper, &work);
        merged
    }
}

pub fn mount_overlay(merged: &Path, lower: &Path, upper: &Path, work: &Path) {
    let options = format!(
        "lowerdir={},upperdir={},workdir={},redirect_dir=on,index=on,metacopy=off",
        lower.display(),
        upper.display(),
        work.display()
    );
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
    export: Option<Export>,
    serving: Vec<JoinHandle<()>>,
}

impl Mounted {
    /// Serves `folder` and mounts it on `mountpoint`.
    pub fn new(folder: &Path, mountpoint: &Path) -> Self {
        Self::with(folder, Config::new(mountpoint.to_owned()))
    }

    pub fn with(folder: &Path, config: Config) -> Self {
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
        Self { root: config.mountpoint, export: Some(export), serving }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn export(&self) -> &Export {
        self.export.as_ref().unwrap()
    }

    /// Takes the mount away and tells why the guest was given up, if it was.
    pub fn unmount(mut self) -> Option<Lost> {
        unmount(&self.root, false).unwrap();
        let lost = self.export.take().unwrap().wait();
        self.serving.drain(..).for_each(|thread| thread.join().unwrap());
        lost
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.export.is_some() {
            let _ = rustix::mount::unmount(&self.root, UnmountFlags::DETACH);
        }
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
