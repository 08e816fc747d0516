//! Entering the jail: every step of `vmctr-jail`, in the order that the next step depends on.
//!
//! ```text
//!   no protection from the kernel's OOM killer
//!   file descriptors in place, all others close on exec
//!   own mount, network, IPC and host-name namespaces
//!   new root from read-only binds ── pivot_root ── the host's root is gone
//!   resource limits
//!   no capabilities ── no groups ── own user ── no new privileges
//!   dies with the parent ── exec
//! ```
//!
//! The process has one thread, so per-thread state is the process's.

use std::convert::Infallible;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use caps::CapSet;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, chdir, getpid, getppid, pivot_root, setgroups, setresgid, setresuid};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};

use super::{FIRST_FD, GuestFile, JailSpec, Limits, sys};

/// Where the new root is put together. Any directory of the host does, as the mount namespace is private
/// and every source is opened before.
const ROOT: &str = "/tmp";

/// Besides `/usr`, each either a symlink into it or a directory of its own.
const SYSTEM_DIRS: [&str; 6] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32"];

const LOADER_CACHE: &str = "/etc/ld.so.cache";

const DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];

/// A step failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct JailError {
    step: String,
    #[source]
    source: io::Error,
}

/// Adds the step to its error.
trait Step<T> {
    fn step(self, step: impl Into<String>) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl Into<String>) -> Result<T, JailError> {
        self.map_err(|error| JailError { step: step.into(), source: error.into() })
    }
}

/// Confines this process and becomes `spec.program`. The process must have one thread only.
///
/// # Errors
/// The step that failed; the process is then half confined and must exit.
pub fn enter(spec: &JailSpec) -> Result<Infallible, JailError> {
    give_up_protection().step("give up the protection from the OOM killer")?;
    let guest = sys::place_fds(&spec.fds, spec.guest, FIRST_FD).step("put file descriptors in place")?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(namespaces).step("make namespaces: run as root")?;
    build_root(spec, &guest)?;
    drop(guest);
    enter_root()?;
    set_limits(spec.limits)?;
    become_nobody(spec)?;
    die_with_parent(spec.parent)?;
    let error = Command::new(&spec.program).args(&spec.args).env_clear().exec();
    Err(error).step(format!("run {}", spec.program.display()))
}

/// containerd protects its shims, which hand that down: a guest's memory must not be the last that the host takes back.
fn give_up_protection() -> io::Result<()> {
    const SCORE: &str = "/proc/self/oom_score_adj";
    if fs::read_to_string(SCORE)?.starts_with('-') { fs::write(SCORE, "0") } else { Ok(()) }
}

/// What a jail takes from the host.
struct HostEntries {
    binds: Vec<PathBuf>,
    links: Vec<(PathBuf, PathBuf)>,
}

fn host_entries(prefix: Option<&Path>) -> Result<HostEntries, JailError> {
    let mut entries = HostEntries { binds: vec![PathBuf::from("/usr")], links: vec![] };
    for name in SYSTEM_DIRS {
        let path = Path::new("/").join(name);
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_symlink() {
            let target = fs::read_link(&path).step(format!("read {}", path.display()))?;
            entries.links.push((path, target));
        } else {
            entries.binds.push(path);
        }
    }
    entries.binds.extend(DEVICES.map(PathBuf::from));
    entries.binds.extend(Some(PathBuf::from(LOADER_CACHE)).filter(|cache| cache.exists()));
    entries.binds.extend(prefix.map(Path::to_owned));
    Ok(entries)
}

/// An opened source, so that mounting the new root cannot hide it, and where it goes.
struct Source {
    file: File,
    is_dir: bool,
    target: PathBuf,
}

fn open_source(path: &Path, target: &Path) -> Result<Source, JailError> {
    let open = || {
        let file = File::options().read(true).custom_flags(libc::O_PATH).open(path)?;
        let is_dir = file.metadata()?.is_dir();
        Ok::<_, io::Error>(Source { file, is_dir, target: in_root(target) })
    };
    open().step(format!("open {}", path.display()))
}

fn build_root(spec: &JailSpec, guest: &OwnedFd) -> Result<(), JailError> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).step("make mounts private")?;
    // Only now: the kernel binds nothing that was opened in another mount namespace.
    let HostEntries { binds, links } = host_entries(spec.prefix.as_deref())?;
    let sources = binds.iter().map(|path| open_source(path, path)).collect::<Result<Vec<_>, _>>()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), ROOT, Some("tmpfs"), flags, Some("mode=755,size=64k")).step("mount the new root")?;
    for (path, target) in &links {
        symlink(target, in_root(path)).step(format!("make {}", path.display()))?;
    }
    sources.iter().try_for_each(bind)?;
    bind_guest_files(guest, &spec.guest_files)?;
    sys::make_read_only(ROOT).step("make the new root read-only")?;
    let writable = spec.guest_files.iter().filter(|file| file.is_writable());
    writable
        .map(|file| in_root(Path::new(&file.path())))
        .try_for_each(|path| sys::make_writable(&path).step("make the guest's RAM writable"))
}

fn bind(source: &Source) -> Result<(), JailError> {
    let Source { file, is_dir, target } = source;
    let bind = || {
        if *is_dir {
            make_dir(target)?;
        } else {
            target.parent().map_or(Ok(()), make_dir)?;
            File::create(target)?;
        }
        let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(opened.as_str()), target, None::<&str>, flags, None::<&str>).map_err(io::Error::from)
    };
    bind().step(format!("bind {}", target.display()))
}

/// The parent keeps the files open for writing, so their own mount cannot be made read-only; binds of them
/// can.
fn bind_guest_files(guest: &OwnedFd, files: &[GuestFile]) -> Result<(), JailError> {
    let stage = in_root(Path::new("/stage"));
    let attach = || {
        make_dir(&stage)?;
        move_mount(guest, "", CWD, &stage, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(io::Error::from)
    };
    attach().step("attach the guest's files")?;
    for file in files {
        bind(&open_source(&stage.join(file.name()), Path::new(&file.path()))?)?;
    }
    umount2(&stage, MntFlags::MNT_DETACH).step("detach the guest's files")?;
    fs::remove_dir(&stage).step("detach the guest's files")
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).create(path)
}

/// The path's place in the new root. Host paths come from the parent, which is trusted.
fn in_root(path: &Path) -> PathBuf {
    Path::new(ROOT).join(path.strip_prefix("/").unwrap_or(path))
}

/// `pivot_root(".", ".")` stacks the old root over the new one, where it can be taken off: pivot_root(2).
fn enter_root() -> Result<(), JailError> {
    chdir(ROOT).step("enter the new root")?;
    pivot_root(".", ".").step("change the root")?;
    umount2(".", MntFlags::MNT_DETACH).step("leave the host's root")?;
    chdir("/").step("enter the new root")
}

fn set_limits(limits: Limits) -> Result<(), JailError> {
    for (resource, limit) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_FSIZE, limits.file_size),
        (Resource::RLIMIT_NOFILE, limits.open_files),
        (Resource::RLIMIT_NPROC, limits.threads),
    ] {
        setrlimit(resource, limit, limit).step("set resource limits")?;
    }
    Ok(())
}

fn become_nobody(spec: &JailSpec) -> Result<(), JailError> {
    for set in [CapSet::Bounding, CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).map_err(io::Error::other).step(format!("clear the {set:?} capabilities"))?;
    }
    let pid = u32::try_from(getpid().as_raw()).map_err(io::Error::other).step("learn the process ID")?;
    let id = spec.first_uid.for_pid(pid);
    setgroups(&[]).step("leave all groups")?;
    let (gid, uid) = (Gid::from_raw(id), Uid::from_raw(id));
    setresgid(gid, gid, gid).step(format!("become group {id}: see jail.first_uid in the config"))?;
    // Leaving user 0 for good also clears the permitted and effective capabilities: capabilities(7).
    setresuid(uid, uid, uid).step(format!("become user {id}: see jail.first_uid in the config"))?;
    set_no_new_privs().step("give up new privileges")
}

/// The kernel forgets the signal when credentials change, so this comes after them.
fn die_with_parent(parent: u32) -> Result<(), JailError> {
    set_pdeathsig(Signal::SIGKILL).step("ask to die with the parent")?;
    if u32::try_from(getppid().as_raw()) == Ok(parent) {
        return Ok(());
    }
    Err(io::Error::other("the parent is gone")).step("die with the parent")
}
