//! Input and output of one process: between containerd's end (FIFO, log file, logging program) and the
//! guest's streams.
//!
//! ```text
//!   open(Names)   -> Endpoints   what can fail at once fails here: missing FIFO, log file, logging program
//!   start(streams)-> ProcessIo   one thread per output; back-pressure is the kernel's buffers
//!   opened()                     waits for the readers of the output, before the start
//!   open_stdin()                 the process was started: its input begins
//!   close_stdin()                CloseIO: the process sees the end once the clients have closed too
//!   drain()                      waits for the output's end, as long as bytes still move
//!   drop                         calls off whatever still waits
//! ```
//!
//! The input waits for the start because a client that is told of the start late must still get its CloseIO
//! through: until the FIFO has a reader it cannot write, so it cannot come to its end. The start waits for the
//! output's readers because a client that is told of the end stops waiting for a FIFO that nobody has opened: what a
//! short process had to say would be lost.
//!
//! Threads with blocking calls, not tasks: a FIFO under an async runtime holds up its shutdown.

mod copy;
mod logger;
mod uri;
mod wait;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, warn};

use copy::Sink;
use logger::{Logger, LoggerChild};
use uri::{Target, UriError};
use wait::Cancel;

/// containerd's names for the streams of a process; empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// One stream carries input and output.
    pub terminal: bool,
    /// Standard input.
    pub stdin: String,
    /// Standard output, or the terminal's.
    pub stdout: String,
    /// Standard error; unused with a terminal.
    pub stderr: String,
}

/// containerd's ends cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The name means nothing.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The name means something that is not there or does not work.
    #[error("Cannot open the stream {name}")]
    Open {
        /// As containerd named it.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The system gives no thread or descriptor.
    #[error("Cannot copy a process's streams")]
    Copy(#[source] io::Error),
}

/// containerd's ends, open or checked.
#[derive(Debug)]
pub struct Endpoints {
    stdin: Option<PathBuf>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<LoggerChild>,
}

/// The guest's ends.
#[derive(Debug, Default)]
pub struct Streams {
    /// Takes the process's input.
    pub stdin: Option<UnixStream>,
    /// Gives its output.
    pub stdout: Option<UnixStream>,
    /// Gives its errors.
    pub stderr: Option<UnixStream>,
}

/// The running copies of one process.
#[derive(Debug)]
pub struct ProcessIo {
    stdin: Stdin,
    outputs: Outputs,
}

/// A process's input.
#[derive(Debug)]
enum Stdin {
    /// The process was not started; CloseIO may have come already.
    Waiting { fifo: PathBuf, stream: UnixStream, closed: bool },
    /// It is copied; no end before this write end is closed, if there is one.
    Open { _keep: Option<OwnedFd> },
    /// There is none, or nothing keeps it open.
    None,
}

/// Tells how far a process's output is.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// Threads that have no target yet.
    opening: watch::Receiver<usize>,
    /// Threads that have not ended.
    open: watch::Receiver<usize>,
    progress: Arc<AtomicU64>,
    cancel: Cancel,
}

/// Opens containerd's ends for a process of this container. Blocks while a logging program gets ready.
pub fn open(names: &Names, id: &str, namespace: &str) -> Result<Endpoints, StdioError> {
    let mut endpoints = Endpoints { stdin: None, stdout: None, stderr: None, logger: None };
    endpoints.stdin = check_stdin(&names.stdin)?;
    let stdout = uri::parse(&names.stdout)?;
    if let Some(Target::Binary(program)) = &stdout {
        let Logger { child, stdout, stderr } =
            logger::start(program, id, namespace).map_err(cannot_open(&names.stdout))?;
        endpoints.stdout = Some(Sink::Open(stdout));
        endpoints.stderr = (!names.terminal).then_some(Sink::Open(stderr));
        endpoints.logger = Some(child);
        return Ok(endpoints);
    }
    endpoints.stdout = sink(stdout, &names.stdout)?;
    if !names.terminal {
        endpoints.stderr = sink(uri::parse(&names.stderr)?, &names.stderr)?;
    }
    Ok(endpoints)
}

fn cannot_open(name: &str) -> impl FnOnce(io::Error) -> StdioError {
    |source| StdioError::Open { name: name.to_owned(), source }
}

fn check_stdin(name: &str) -> Result<Option<PathBuf>, StdioError> {
    match uri::parse(name)? {
        None => Ok(None),
        Some(Target::Path(path)) => {
            path.metadata().map_err(cannot_open(name))?;
            Ok(Some(path))
        }
        Some(_) => Err(UriError::Scheme(name.to_owned()).into()),
    }
}

fn sink(target: Option<Target>, name: &str) -> Result<Option<Sink>, StdioError> {
    match target {
        None => Ok(None),
        Some(Target::Path(path)) => {
            path.metadata().map_err(cannot_open(name))?;
            Ok(Some(Sink::Path(path)))
        }
        Some(Target::File(path)) => {
            log_file(&path).map(|file| Some(Sink::Open(file))).map_err(cannot_open(name))
        }
        Some(Target::Binary(_)) => Err(UriError::Scheme(name.to_owned()).into()),
    }
}

fn log_file(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

impl Endpoints {
    /// Which streams the guest must provide: stdin, stdout, stderr.
    pub fn wanted(&self) -> [bool; 3] {
        [self.stdin.is_some(), self.stdout.is_some(), self.stderr.is_some()]
    }

    /// Starts copying.
    pub fn start(self, streams: Streams) -> Result<ProcessIo, StdioError> {
        let cancel = Cancel::new().map_err(StdioError::Copy)?;
        let progress = Arc::new(AtomicU64::new(0));
        let ((ready, opening), (done, open)) = (watch::channel(0), watch::channel(0));
        let mut io = ProcessIo { stdin: Stdin::None, outputs: Outputs { opening, open, progress, cancel } };
        if let (Some(fifo), Some(stream)) = (self.stdin, streams.stdin) {
            io.stdin = Stdin::Waiting { fifo, stream, closed: false };
        }
        for (sink, stream) in [(self.stdout, streams.stdout), (self.stderr, streams.stderr)] {
            if let (Some(sink), Some(stream)) = (sink, stream) {
                io.spawn_output(stream, sink, CountGuard::new(ready.clone()), done.clone())?;
            }
        }
        if let Some(logger) = self.logger {
            let cancel = io.outputs.cancel.clone();
            spawn("logger", Some(done), move || logger.reap(&cancel))?;
        }
        Ok(io)
    }
}

impl ProcessIo {
    fn spawn_input(&self, fifo: File, stream: UnixStream) -> Result<(), StdioError> {
        copy::prepare(&stream).map_err(StdioError::Copy)?;
        let cancel = self.outputs.cancel.clone();
        spawn("stdin", None, move || {
            if let Err(error) = copy::input(&fifo, &stream, &cancel) {
                debug!("Input ended early: {error}");
            }
        })
    }

    fn spawn_output(
        &self,
        stream: UnixStream,
        sink: Sink,
        opening: CountGuard,
        done: watch::Sender<usize>,
    ) -> Result<(), StdioError> {
        copy::prepare(&stream).map_err(StdioError::Copy)?;
        let Outputs { progress, cancel, .. } = self.outputs.clone();
        spawn("output", Some(done), move || {
            if let Err(error) = copy::output(&stream, sink, &cancel, &progress, || drop(opening)) {
                debug!("Output ended early: {error}");
            }
        })
    }

    /// The process runs: its input may begin.
    pub fn open_stdin(&mut self) -> Result<(), StdioError> {
        let Stdin::Waiting { fifo, stream, closed } = mem::replace(&mut self.stdin, Stdin::None) else {
            return Ok(());
        };
        let failed = |source| StdioError::Open { name: fifo.display().to_string(), source };
        let (reader, keep) = copy::open_input(&fifo).map_err(failed)?;
        if !closed {
            self.stdin = Stdin::Open { _keep: keep };
        }
        self.spawn_input(reader, stream)
    }

    /// CloseIO: from now on the input ends when containerd's clients have closed it.
    pub fn close_stdin(&mut self) {
        match &mut self.stdin {
            Stdin::Waiting { closed, .. } => *closed = true,
            open => *open = Stdin::None,
        }
    }

    /// For waiting without holding the process.
    pub fn outputs(&self) -> Outputs {
        self.outputs.clone()
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.outputs.cancel.fire();
    }
}

impl Outputs {
    /// Waits until all output has somewhere to go, `limit` at most: a client may never read.
    pub async fn opened(mut self, limit: Duration) {
        // An error means that the last thread has its target. Without a reader the thread goes on waiting.
        let _ = timeout(limit, self.opening.wait_for(|opening| *opening == 0)).await;
    }

    /// Waits until all output is delivered. Gives up when nothing has moved for `quiet`.
    pub async fn drain(mut self, quiet: Duration) {
        loop {
            let before = self.progress.load(Ordering::Relaxed);
            // An error means that the last thread has dropped its sender.
            if timeout(quiet, self.open.wait_for(|open| *open == 0)).await.is_ok() {
                return;
            }
            if self.progress.load(Ordering::Relaxed) == before {
                warn!("Output is not read; the rest of it is dropped after {} s", quiet.as_secs());
                return;
            }
        }
    }
}

/// Runs a thread; `open` counts the output threads that have not ended.
fn spawn(
    name: &str,
    open: Option<watch::Sender<usize>>,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), StdioError> {
    let guard = open.map(CountGuard::new);
    let body = move || {
        work();
        drop(guard);
    };
    thread::Builder::new().name(name.to_owned()).spawn(body).map(drop).map_err(StdioError::Copy)
}

struct CountGuard(watch::Sender<usize>);

impl CountGuard {
    fn new(open: watch::Sender<usize>) -> Self {
        open.send_modify(|count| *count += 1);
        Self(open)
    }
}

impl Drop for CountGuard {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests;
