//! Exports: overlays of the share's folders, served to the host.
//!
//! ```text
//!   add(N)   /run/vmctr/exports/N/rootfs <─ overlay of share/lower/... and share/upper ──> Server N
//!   stream on vsock EXPORT ─ hello: N ──> a thread in Server N until the host closes the stream
//! ```
//!
//! An export stays until the guest ends. Streams are bounded, and so is the time that one may take to say hello.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::Duration;

use nix::sched::CloneFlags;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use vmctr_fileshare::export::guest::{Layers, ServeError, Server};
use vmctr_fileshare::export::wire::hello::{Hello, HelloError};
use vmctr_fileshare::export::wire::stream::Stream;
use vmctr_proto::ports;
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::boot::console;
use crate::rootfs::{self, Form, RootPlan, Upper};

const DIR: &str = "/run/vmctr/exports";

/// The host takes a few for each export.
const MAX_STREAMS: usize = 1024;
/// How long the host has to say hello.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// Pause after a failed accept, so that running out of files does not spin.
const RETRY: Duration = Duration::from_millis(100);
/// Each file that the host's kernel remembers is an open file here: memory is what bounds them.
const OPEN_FILES: u64 = 1 << 22;

/// The exports of this guest; clones are the same.
#[derive(Clone, Default)]
pub struct Exports(Arc<State>);

#[derive(Default)]
struct State {
    servers: Mutex<HashMap<u32, Arc<Server>>>,
    streams: AtomicUsize,
}

/// An export cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("export {0} is there already")]
    Exists(u32),
    #[error(transparent)]
    Mount(#[from] rootfs::Error),
    #[error("{0}")]
    Io(String, #[source] io::Error),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |error| Error::Io(what, error)
}

impl Exports {
    /// None yet; streams are accepted from now on.
    pub fn listen() -> io::Result<Self> {
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, ports::EXPORT)?;
        let exports = Self::default();
        let accepting = exports.clone();
        Builder::new().name("exports".into()).spawn(move || accepting.accept(&listener))?;
        Ok(exports)
    }

    /// Mounts an overlay and serves it under this number. Blocks.
    pub fn add(&self, number: u32, plan: RootPlan) -> Result<(), Error> {
        if self.servers().contains_key(&number) {
            return Err(Error::Exists(number));
        }
        let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
        setrlimit(Resource::Nofile, limit).map_err(|error| io_error("allowing open files")(error.into()))?;
        let dir = Path::new(DIR).join(number.to_string());
        fs::create_dir_all(&dir).map_err(io_error(format!("creating {}", dir.display())))?;
        let server = mount_apart(plan, dir.clone()).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = rootfs::remove(&dir);
        })?;
        self.servers().insert(number, Arc::new(server));
        Ok(())
    }

    fn servers(&self) -> MutexGuard<'_, HashMap<u32, Arc<Server>>> {
        self.0.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, listener: &VsockListener) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => self.start(stream.into()),
                Err(error) => {
                    console::warn(&format!("accepting an export's stream: {error}"));
                    thread::sleep(RETRY);
                }
            }
        }
    }

    /// Gives the stream a thread; without one it is closed, which tells the host.
    fn start(&self, stream: OwnedFd) {
        if self.0.streams.fetch_add(1, Ordering::Relaxed) >= MAX_STREAMS {
            self.0.streams.fetch_sub(1, Ordering::Relaxed);
            return console::warn("too many streams for exports");
        }
        let exports = self.clone();
        let serve = move || {
            if let Err(error) = exports.serve(stream.into()) {
                console::warn(&format!("an export's stream: {error}"));
            }
            exports.0.streams.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = Builder::new().name("export".into()).spawn(serve) {
            self.0.streams.fetch_sub(1, Ordering::Relaxed);
            console::warn(&format!("starting a thread for an export: {error}"));
        }
    }

    fn serve(&self, stream: Stream) -> Result<(), ServeError> {
        let limit = |time| stream.set_limits(time, None).map_err(ServeError::Thread);
        limit(Some(HELLO_TIME))?;
        let hello = Hello::hear(&stream).map_err(ServeError::Hello)?;
        limit(None)?;
        let server = self.servers().get(&hello.export).cloned();
        match server {
            Some(server) => server.serve_greeted(stream, &hello),
            None => refuse(&stream).map_err(ServeError::Hello),
        }
    }
}

fn refuse(stream: &Stream) -> Result<(), HelloError> {
    Hello::refuse(stream, Errno::NOENT.raw_os_error().unsigned_abs())
}

/// Mounting an overlay of many folders takes a change of the working directory, which must not be everybody's.
fn mount_apart(plan: RootPlan, dir: PathBuf) -> Result<Server, Error> {
    let mount = move || {
        nix::sched::unshare(CloneFlags::CLONE_FS)
            .map_err(|error| io_error("leaving the common working directory")(error.into()))?;
        rootfs::build(&plan, Form::Union, &dir)?;
        let server = Server::new(&dir.join(rootfs::ROOTFS))?;
        let layers = open_layers(&plan).map_err(io_error("opening the layers"))?;
        Ok(layers.into_iter().fold(server, Server::with_layers))
    };
    let mounting = Builder::new().name("mount".into()).spawn(mount).map_err(io_error("starting a thread"))?;
    mounting.join().unwrap_or_else(|_| Err(io_error("mounting")(io::Error::other("the thread panicked"))))
}

fn open_layers(plan: &RootPlan) -> io::Result<Option<Layers>> {
    let RootPlan::Overlay { lowers, upper } = plan else { return Ok(None) };
    let place = |folder: &PathBuf| rootfs::in_share(folder).map_err(io::Error::other);
    let upper = match upper {
        Upper::Host { upper, .. } => Some(place(upper)?),
        Upper::None | Upper::Guest { .. } => None,
    };
    let lowers = lowers.iter().map(place).collect::<io::Result<Vec<_>>>()?;
    Layers::open(upper.as_deref(), &lowers).map(Some)
}
