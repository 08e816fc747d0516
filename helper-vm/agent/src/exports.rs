//! Exports: folders of the guest, served to the host.
//!
//! ```text
//!   add(N)          a union, see `unions` ───────────────────────> Server N
//!   add_container   containers/cN/rootfs, behind the container's gate ──> Server N
//!   stream on vsock EXPORT ─ hello: N ──> a thread in Server N until the host closes the stream, or Server N ends
//! ```
//!
//! A union's stays until the union is removed. A container's ends with its container, or when its last stream
//! closes: then nothing holds the container's root any more. Streams are bounded, and so is the time that one may
//! take to say hello.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::sync::Notify;
use vmctr_fileshare::export::guest::{Gate, ServeError, Server};
use vmctr_fileshare::export::wire::hello::{Hello, HelloError};
use vmctr_fileshare::export::wire::stream::Stream;
use vmctr_proto::ports;
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::boot::console;

/// The host takes a few for each export.
const MAX_STREAMS: usize = 1024;
/// How long the host has to say hello.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// Between two looks whether an export's threads have ended.
const POLL: Duration = Duration::from_millis(2);
/// Pause after a failed accept, so that running out of files does not spin.
const RETRY: Duration = Duration::from_millis(100);
/// Each file that the host's kernel remembers is an open file here: memory is what bounds them.
const OPEN_FILES: u64 = 1 << 22;

/// The exports of this guest; clones are the same.
#[derive(Clone, Default)]
pub struct Exports(Arc<State>);

#[derive(Default)]
struct State {
    table: Mutex<Table>,
    streams: AtomicUsize,
}

#[derive(Default)]
struct Table {
    exports: HashMap<u32, Export>,
    /// Streams ever greeted: names them.
    greeted: u64,
}

/// A server and who talks to it.
struct Export {
    server: Arc<Server>,
    /// The greeted streams, to be closed when it ends.
    streams: HashMap<u64, OwnedFd>,
    /// Told when it ends; none: it stays.
    ended: Option<Arc<Notify>>,
}

/// An export of a container.
pub struct Lent {
    /// What streams call it.
    pub number: u32,
    /// Told when it has ended.
    pub ended: Arc<Notify>,
}

/// An export cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there are too many exports")]
    Full,
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

    /// Serves a union under this number; false when that is taken.
    pub fn add(&self, number: u32, server: Server) -> Result<bool, Error> {
        allow_open_files()?;
        let mut table = self.table();
        let free = !table.exports.contains_key(&number);
        if free {
            table.exports.insert(number, Export::new(server, None));
        }
        Ok(free)
    }

    /// Serves a container's root under a number of its own. Blocks.
    pub fn add_container(&self, root: &Path, gate: Arc<Gate>) -> Result<Lent, Error> {
        allow_open_files()?;
        let server = Server::new(root)?.with_gate(gate);
        let ended = Arc::new(Notify::new());
        let mut table = self.table();
        let number = (0..=u32::MAX).find(|number| !table.exports.contains_key(number)).ok_or(Error::Full)?;
        table.exports.insert(number, Export::new(server, Some(Arc::clone(&ended))));
        Ok(Lent { number, ended })
    }

    /// Whether the export has streams.
    pub fn is_used(&self, number: u32) -> bool {
        self.table().exports.get(&number).is_some_and(|export| !export.streams.is_empty())
    }

    /// Ends an export: its streams close, which tells the host.
    pub fn end(&self, number: u32) {
        let ended = self.table().exports.remove(&number);
        ended.into_iter().for_each(Export::end);
    }

    /// As [`Exports::end`], and waits for its threads; false when they take too long. Blocks.
    pub fn end_patiently(&self, number: u32, limit: Duration) -> bool {
        let Some(export) = self.table().exports.remove(&number) else { return true };
        let server = Arc::downgrade(&export.server);
        export.end();
        let until = Instant::now() + limit;
        while server.strong_count() > 0 {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(POLL);
        }
        true
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
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
        let Some((server, name)) = self.join(hello.export, &stream).map_err(ServeError::Thread)? else {
            return refuse(&stream).map_err(ServeError::Hello);
        };
        let served = server.serve_greeted(stream, &hello);
        drop(server);
        self.leave(hello.export, name);
        served
    }

    /// Notes a stream with its export; none when there is no such export.
    fn join(&self, number: u32, stream: &Stream) -> io::Result<Option<(Arc<Server>, u64)>> {
        let mut table = self.table();
        table.greeted += 1;
        let name = table.greeted;
        let Some(export) = table.exports.get_mut(&number) else { return Ok(None) };
        export.streams.insert(name, stream.as_fd().try_clone_to_owned()?);
        Ok(Some((Arc::clone(&export.server), name)))
    }

    /// A stream has closed. It may have been the last.
    fn leave(&self, number: u32, name: u64) {
        let mut table = self.table();
        let Some(export) = table.exports.get_mut(&number) else { return };
        let was_there = export.streams.remove(&name).is_some();
        if was_there && export.streams.is_empty() && export.ended.is_some() {
            table.exports.remove(&number).into_iter().for_each(Export::end);
        }
    }
}

impl Export {
    fn new(server: Server, ended: Option<Arc<Notify>>) -> Self {
        Self { server: Arc::new(server), streams: HashMap::new(), ended }
    }

    /// The threads that serve it see their streams end and let go of it.
    fn end(self) {
        for stream in self.streams.values() {
            // One that is closed already is as good.
            let _ = rustix::net::shutdown(stream, Shutdown::Both);
        }
        if let Some(ended) = self.ended {
            ended.notify_one();
        }
    }
}

fn allow_open_files() -> Result<(), Error> {
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    setrlimit(Resource::Nofile, limit).map_err(|error| io_error("allowing open files")(error.into()))
}

fn refuse(stream: &Stream) -> Result<(), HelloError> {
    Hello::refuse(stream, Errno::NOENT.raw_os_error().unsigned_abs())
}
