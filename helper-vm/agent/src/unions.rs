//! Unions: overlays of shares that were plugged in while the guest runs, one per port.
//!
//! ```text
//!   port N ── virtiofs device ──> /run/vmctr/unions/N ── overlay ──> /run/vmctr/exports/N/rootfs ──> Server N
//! ```
//!
//! Invariant: after [`Union::remove`] has succeeded, the port is as if nothing had ever been in it. The share's mountpoint
//! is never removed with what is in it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::Builder;
use std::time::Duration;

use nix::sched::CloneFlags;
use rustix::fs::{major, minor, syncfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use vmctr_fileshare::export::guest::{Layers, ServeError, Server};
use vmctr_proto::guest_paths;
use vmctr_proto::union_ports::{self, Place};

use crate::devices::Port;
use crate::exports::{self, Exports};
use crate::rootfs::{self, Form, RootPlan, Upper};

const EXPORTS_DIR: &str = "/run/vmctr/exports";

/// How long the threads of an export may take to end when its streams are closed.
const THREADS_TIME: Duration = Duration::from_secs(3);

/// KiB, and the most that one request to the share brings; the kernel's default is an eighth.
const READ_AHEAD_KB: &str = "1024";

/// A union, by the number of its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Union(u32);

/// A union cannot be, or cannot go.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no port {0} for unions")]
    Number(u32),
    #[error("port {0} has a union already")]
    Exists(u32),
    #[error("the union in port {0} is still used")]
    Used(u32),
    #[error("{0}")]
    Io(String, #[source] io::Error),
    #[error(transparent)]
    Root(#[from] rootfs::Error),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Export(#[from] exports::Error),
}

type Result<T> = std::result::Result<T, Error>;

fn io_error<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    let what = what.into();
    move |error| Error::Io(what, error.into())
}

impl Union {
    /// The union in this port.
    pub fn parse(port: u32) -> Result<Self> {
        if port < union_ports::COUNT { Ok(Self(port)) } else { Err(Error::Number(port)) }
    }

    /// The port's number.
    pub fn number(self) -> u32 {
        self.0
    }

    /// Mounts and serves it. Blocks.
    pub fn add(self, exports: &Exports, plan: RootPlan) -> Result<()> {
        let share = self.share();
        // Whoever makes the folder has the port; it goes with the union.
        fs::create_dir_all("/run/vmctr/unions").map_err(io_error("creating the folder of unions"))?;
        fs::create_dir(&share).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists(self.0),
            _ => io_error(format!("creating {}", share.display()))(error),
        })?;
        let added = self.mount_share(&share).and_then(|()| self.serve(exports, plan));
        added.inspect_err(|_| {
            // The first error is the one to tell.
            let _ = self.remove(exports);
        })
    }

    /// Writes what is dirty back to the host. Blocks.
    pub fn flush(self) -> Result<()> {
        let share = File::open(self.share()).map_err(io_error("opening the union's share"))?;
        syncfs(&share).map_err(io_error("writing the union's share back"))
    }

    /// Undoes [`Union::add`], also one that stopped half-way. Blocks, for ever if the share's daemon is gone.
    pub fn remove(self, exports: &Exports) -> Result<()> {
        let idle = exports.end_patiently(self.0, THREADS_TIME);
        rootfs::remove(&self.dir())?;
        let share = self.share();
        // With what the kernel has mounted below it by itself.
        match unmount(&share, UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => return Err(io_error(format!("unmounting {}", share.display()))(errno)),
        }
        let port = Port::at(Place::of_union(self.0));
        port.map_or(Ok(()), |port| port.clear()).map_err(io_error("letting the union's device go"))?;
        match fs::remove_dir(&share) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error(format!("removing {}", share.display()))(error));
            }
            _ => {}
        }
        if idle { Ok(()) } else { Err(Error::Used(self.0)) }
    }

    fn mount_share(self, share: &Path) -> Result<()> {
        let port = Port::at(Place::of_union(self.0));
        port.map_or_else(crate::devices::look, |port| port.look())
            .map_err(io_error("looking for the union's device"))?;
        let tag = guest_paths::union_tag(self.0);
        // No flags, as for a container's share: what may be done, the host's mount says.
        let mounted = mount(tag.as_str(), share, "virtiofs", MountFlags::empty(), None);
        mounted.map_err(io_error(format!("mounting share {tag:?}")))?;
        read_ahead(share).map_err(io_error("setting how much of the union's files is read ahead"))
    }

    fn serve(self, exports: &Exports, plan: RootPlan) -> Result<()> {
        let dir = self.dir();
        fs::create_dir_all(&dir).map_err(io_error(format!("creating {}", dir.display())))?;
        let server = mount_apart(plan, self.share(), dir)?;
        if exports.add(self.0, server)? { Ok(()) } else { Err(Error::Exists(self.0)) }
    }

    fn share(self) -> PathBuf {
        guest_paths::union_share(self.0).into()
    }

    fn dir(self) -> PathBuf {
        Path::new(EXPORTS_DIR).join(self.0.to_string())
    }
}

/// Copying a file up reads it from its beginning to its end, and each request costs a turn to the host.
fn read_ahead(share: &Path) -> io::Result<()> {
    let device = fs::metadata(share)?.dev();
    let queue = format!("/sys/class/bdi/{}:{}/read_ahead_kb", major(device), minor(device));
    fs::write(queue, READ_AHEAD_KB)
}

/// Mounting an overlay of many folders takes a change of the working directory, which must not be everybody's.
fn mount_apart(plan: RootPlan, share: PathBuf, dir: PathBuf) -> Result<Server> {
    let mount = move || {
        nix::sched::unshare(CloneFlags::CLONE_FS)
            .map_err(io_error("leaving the common working directory"))?;
        rootfs::build(&plan, Form::Union, &share, &dir)?;
        let server = Server::new(&dir.join(rootfs::ROOTFS))?;
        let layers = open_layers(&plan, &share).map_err(io_error("opening the layers"))?;
        Ok(layers.into_iter().fold(server, Server::with_layers))
    };
    let mounting = Builder::new().name("mount".into()).spawn(mount).map_err(io_error("starting a thread"))?;
    mounting.join().unwrap_or_else(|_| Err(io_error("mounting")(io::Error::other("the thread panicked"))))
}

fn open_layers(plan: &RootPlan, share: &Path) -> io::Result<Option<Layers>> {
    let RootPlan::Overlay { lowers, upper } = plan else { return Ok(None) };
    let place = |folder: &PathBuf| rootfs::in_share(share, folder).map_err(io::Error::other);
    let upper = match upper {
        Upper::Host { upper, .. } => Some(place(upper)?),
        Upper::None | Upper::Guest { .. } => None,
    };
    let lowers = lowers.iter().map(place).collect::<io::Result<Vec<_>>>()?;
    Layers::open(upper.as_deref(), &lowers).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ports_that_there_are_have_unions() {
        assert_eq!(Union::parse(union_ports::COUNT - 1).unwrap().number(), union_ports::COUNT - 1);
        assert!(matches!(Union::parse(union_ports::COUNT), Err(Error::Number(_))));
        assert!(matches!(Union::parse(u32::MAX), Err(Error::Number(_))));
    }
}
