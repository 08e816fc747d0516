//! The container's root file system, built from folders of the share.
//!
//! ```text
//!   containers/cN/
//!     rootfs/   the root: an overlay of the folders below, or one folder as it is
//!     layers/   0, 1, ... -> share/lower/...   upper -> share/upper   work -> share/work
//!     upper/    tmpfs holding upper/ and work/, when changes stay in the guest
//! ```
//!
//! Overlay takes its folders in one page of options. `layers/` gives each the shortest possible name, so
//! that the kernel's own limit of 500 lower folders is the only one, on any kernel.

mod plan;

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, mount_remount, unmount};
use rustix::process::chdir;

pub use plan::{Form, PlanError, RootPlan, Upper};

/// Name of the root inside the container's directory.
pub const ROOTFS: &str = "rootfs";
const LAYERS: &str = "layers";
const GUEST_UPPER: &str = "upper";
/// The upper folder on the tmpfs.
const UPPER: &str = "upper";

/// Building or removing the root failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} {path}", path = path.display())]
    Step { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} is not in the share", path = path.display())]
    Missing { path: PathBuf },
}

fn step<T, E: Into<io::Error>>(what: &'static str, path: &Path, result: Result<T, E>) -> Result<T, Error> {
    result.map_err(|error| Error::Step { what, path: path.to_owned(), source: error.into() })
}

/// Builds the root in the container's directory, from folders of the share that is mounted at `share`. Changes the working directory: for a short-lived process, or a
/// thread with a working directory of its own.
pub fn build(plan: &RootPlan, form: Form, share: &Path, dir: &Path) -> Result<(), Error> {
    let rootfs = dir.join(ROOTFS);
    step("creating", &rootfs, fs::create_dir(&rootfs))?;
    match plan {
        RootPlan::Folder(folder) => bind(&in_share(share, folder)?, &rootfs, false),
        // Overlay refuses a single lower folder without an upper one: it would change nothing.
        RootPlan::Overlay { lowers, upper: Upper::None } if lowers.len() == 1 => {
            bind(&in_share(share, &lowers[0])?, &rootfs, true)
        }
        RootPlan::Overlay { lowers, upper } => overlay((lowers, upper), form, share, dir, &rootfs),
    }
}

/// Undoes [`build`], also one that stopped half-way.
pub fn remove(dir: &Path) -> Result<(), Error> {
    for mounted in [ROOTFS, GUEST_UPPER] {
        let path = dir.join(mounted);
        // Lazily, when something still holds it: all its users are dead, the kernel lets go soon.
        let unmounted =
            unmount(&path, UnmountFlags::empty()).or_else(|_| unmount(&path, UnmountFlags::DETACH));
        match unmounted {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return step("unmounting", &path, Err(error)),
        }
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => step("removing", dir, Err(error)),
        _ => Ok(()),
    }
}

/// Where a container in `dir` keeps its changes, if that is in the guest.
pub fn guest_upper(dir: &Path) -> Option<PathBuf> {
    let upper = dir.join(GUEST_UPPER).join(UPPER);
    upper.is_dir().then_some(upper)
}

/// A folder of the share.
pub fn in_share(share: &Path, folder: &Path) -> Result<PathBuf, Error> {
    let path = share.join(folder);
    if path.is_dir() { Ok(path) } else { Err(Error::Missing { path: folder.to_owned() }) }
}

fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), Error> {
    step("bind-mounting", source, mount_bind_recursive(source, target))?;
    if read_only {
        let flags = MountFlags::BIND | MountFlags::RDONLY;
        step("making read-only", target, mount_remount(target, flags, c""))?;
    }
    Ok(())
}

fn overlay(
    (lowers, upper): (&[PathBuf], &Upper),
    form: Form,
    share: &Path,
    dir: &Path,
    rootfs: &Path,
) -> Result<(), Error> {
    let layers = dir.join(LAYERS);
    step("creating", &layers, fs::create_dir(&layers))?;
    let link = |name: &str, target: PathBuf| {
        let path = layers.join(name);
        step("linking", &path, symlink(target, &path))
    };
    for (index, lower) in lowers.iter().enumerate() {
        let lower = in_share(share, lower)?;
        // A layer on another file system of the host than the rest is an automount, which the overlay's own
        // look at the path does not trigger.
        step("opening", &lower, fs::File::open(&lower))?;
        link(&index.to_string(), lower)?;
    }
    if let Some((upper, work)) = upper_folders(upper, share, dir)? {
        link("upper", upper)?;
        link("work", work)?;
    }
    let options = plan::overlay_options(lowers.len(), !matches!(upper, Upper::None), form);
    step("entering", &layers, chdir(&layers))?;
    step(
        "mounting the overlay on",
        rootfs,
        mount("overlay", rootfs, "overlay", MountFlags::empty(), options.as_c_str()),
    )?;
    step("leaving", &layers, chdir("/"))
}

fn upper_folders(upper: &Upper, share: &Path, dir: &Path) -> Result<Option<(PathBuf, PathBuf)>, Error> {
    match upper {
        Upper::None => Ok(None),
        Upper::Host { upper, work } => Ok(Some((in_share(share, upper)?, in_share(share, work)?))),
        Upper::Guest { size_bytes } => {
            let base = dir.join(GUEST_UPPER);
            step("creating", &base, fs::create_dir(&base))?;
            let options = plan::tmpfs_options(*size_bytes);
            step(
                "mounting tmpfs on",
                &base,
                mount("tmpfs", &base, "tmpfs", MountFlags::empty(), options.as_c_str()),
            )?;
            let folders = (base.join(UPPER), base.join("work"));
            step("creating", &folders.0, fs::create_dir(&folders.0))?;
            step("creating", &folders.1, fs::create_dir(&folders.1))?;
            Ok(Some(folders))
        }
    }
}
