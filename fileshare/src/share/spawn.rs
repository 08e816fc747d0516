//! Starts a daemon and holds on to it.
//!
//! ```text
//!   caller ── spawn() ──> thread "fsd": forks the daemon, tells its PID, waits for its exit
//!     │ order ──────────────> daemon
//!     │ <── ready ────────────┘
//!     └─ Fsd { socket, stderr, pidfd }
//! ```
//!
//! Invariant: a daemon lives no longer than its [`Fsd`] nor than this process. The daemon dies with the *thread*
//! that forked it (PR_SET_PDEATHSIG), so that thread is one of our own that waits for it: callers may call from
//! any thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};

use super::control::{self, Answer, ControlError};
use super::spec::{ShareSpec, SpecError};

/// Name of the listening socket, for the moment between bind and connect.
const SOCKET_NAME: &str = "fsd.sock";

/// A start takes some milliseconds; a source on a network file system that does not answer takes for ever.
const PATIENCE: Duration = Duration::from_secs(15);

/// The waiting thread needs next to no stack.
const WAITER_STACK: usize = 64 << 10;

/// No daemon was started; nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The order is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The vhost-user socket could not be made.
    #[error("cannot make the share's socket {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The program did not run.
    #[error("cannot start {binary}")]
    Start {
        /// The program.
        binary: PathBuf,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The control socket failed.
    #[error("cannot talk to the share daemon")]
    Control(#[from] ControlError),
    /// The daemon said why it cannot share.
    #[error("cannot share files with the VM: {0}")]
    Refused(String),
    /// The daemon died before it could say anything.
    #[error("the share daemon ended before it was ready ({0}); its log says why")]
    Died(Exit),
}

/// How a daemon ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this status: 0 after QEMU hung up, 128 + N when signal N killed the serving process.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Somebody else reaped the process and has its status.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("status unknown"),
        }
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Unknown,
        }
    }
}

/// A running daemon. Dropping it kills the daemon and waits until it is gone.
#[derive(Debug)]
pub struct Fsd {
    /// The vhost-user connection, for QEMU: take it. The daemon ends when all copies of it are closed.
    pub socket: Option<OwnedFd>,
    /// The daemon's log, line by line. `None` once taken.
    pub stderr: Option<ChildStderr>,
    process: Process,
}

impl Fsd {
    /// Process ID of the daemon. Killing it ends its server process as well.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Becomes readable when the daemon ends.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.pidfd.as_fd()
    }

    /// Ends the daemon at once.
    ///
    /// # Errors
    /// As kill(2) does; a daemon that is gone already is no error.
    pub fn kill(&self) -> io::Result<()> {
        self.process.kill()
    }

    /// Waits for the daemon's end; any number of threads may.
    #[must_use]
    pub fn wait(&self) -> Exit {
        self.process.ended.wait()
    }
}

/// The vhost-user connection of a daemon that does not run yet: QEMU may have its end before the daemon is there,
/// and then waits for it.
#[derive(Debug)]
pub struct Connection {
    listener: UnixListener,
    /// QEMU's end: take it, or have it from [`Fsd::socket`].
    pub socket: Option<OwnedFd>,
}

impl Connection {
    /// Connects. `socket_dir` holds a socket file for a moment; only root may be able to enter it.
    ///
    /// # Errors
    /// The socket cannot be made there.
    pub fn new(socket_dir: &Path) -> Result<Self, SpawnError> {
        let (listener, socket) = connection(&socket_dir.join(SOCKET_NAME))?;
        Ok(Self { listener, socket: Some(socket.into()) })
    }
}

/// Starts `binary` (`vmctr-fsd`) to share what `spec` says, and waits until it serves. `socket_dir` holds a socket
/// file for a moment; only root may be able to enter it. `log` says what the daemon logs (`info`,
/// `vmctr_fileshare=debug`, ...). Blocks, as a rule for some milliseconds.
///
/// # Errors
/// Why the daemon does not serve.
pub fn spawn(binary: &Path, spec: &ShareSpec, socket_dir: &Path, log: &str) -> Result<Fsd, SpawnError> {
    spec.validate()?;
    spawn_on(binary, spec, Connection::new(socket_dir)?, log)
}

/// The same for a connection that is there already.
///
/// # Errors
/// As for [`spawn`].
pub fn spawn_on(
    binary: &Path,
    spec: &ShareSpec,
    connection: Connection,
    log: &str,
) -> Result<Fsd, SpawnError> {
    spec.validate()?;
    let Connection { listener, socket } = connection;
    let (mut control, daemon_end) = UnixStream::pair().map_err(ControlError::from)?;
    let (process, stderr) = start(binary, log, daemon_end.into())
        .map_err(|cause| SpawnError::Start { binary: binary.to_owned(), cause })?;
    // From here on, an error drops `process`, which kills the daemon.
    control::send_order(&mut control, spec, &listener)?;
    drop(listener);
    match control::receive_answer(&control, PATIENCE)? {
        Answer::Ready => Ok(Fsd { socket, stderr, process }),
        Answer::Failed(reason) => Err(SpawnError::Refused(reason)),
        Answer::Gone => Err(SpawnError::Died(process.ended.wait())),
    }
}

/// A listening socket with one connection that waits to be accepted, and the other end of that connection. No
/// file is left, so nobody else can connect.
fn connection(path: &Path) -> Result<(UnixListener, UnixStream), SpawnError> {
    let fail = |cause| SpawnError::Socket { path: path.to_owned(), cause };
    let listener = UnixListener::bind(path).map_err(fail)?;
    let socket = UnixStream::connect(path);
    std::fs::remove_file(path).map_err(fail)?;
    Ok((listener, socket.map_err(fail)?))
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    ended: Arc<Ended>,
}

impl Process {
    fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.kill().is_ok() {
            self.ended.wait();
        }
    }
}

/// The exit, once known.
#[derive(Debug, Default)]
struct Ended {
    exit: Mutex<Option<Exit>>,
    changed: Condvar,
}

impl Ended {
    fn lock(&self) -> MutexGuard<'_, Option<Exit>> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, exit: Exit) {
        *self.lock() = Some(exit);
        self.changed.notify_all();
    }

    fn wait(&self) -> Exit {
        let mut exit = self.lock();
        loop {
            match *exit {
                Some(exit) => return exit,
                None => exit = self.changed.wait(exit).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

type Started = (Process, Option<ChildStderr>);

/// Starts the program from a thread that stays until it ends.
fn start(binary: &Path, log: &str, stdin: OwnedFd) -> io::Result<Started> {
    let mut command = Command::new(binary);
    command.env_clear().env("RUST_LOG", log).current_dir("/");
    command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped());
    let (tell, told) = mpsc::sync_channel(1);
    thread::Builder::new().name("fsd".to_owned()).stack_size(WAITER_STACK).spawn(move || {
        let child = command.spawn();
        // It holds the daemon's end of the control socket, whose closing tells of the daemon's death.
        drop(command);
        run_child(child, &tell);
    })?;
    told.recv().unwrap_or_else(|_| Err(io::Error::other("the starting thread ended")))
}

/// Hands the child to the caller and waits for its end.
fn run_child(child: io::Result<Child>, tell: &mpsc::SyncSender<io::Result<Started>>) {
    let ended = Arc::new(Ended::default());
    // Sending fails when nobody waits for the answer, which the caller does until there is one.
    match child.and_then(|child| watch(child, &ended)) {
        Ok((mut child, started)) => {
            let unsent = tell.send(Ok(started));
            ended.set(child.wait().map_or(Exit::Unknown, Exit::from));
            drop(unsent);
        }
        Err(error) => drop(tell.send(Err(error))),
    }
}

fn watch(mut child: Child, ended: &Arc<Ended>) -> io::Result<(Child, Started)> {
    let stderr = child.stderr.take();
    match open_pidfd(&child) {
        Ok((pid, pidfd)) => Ok((child, (Process { pid, pidfd, ended: Arc::clone(ended) }, stderr))),
        Err(error) => {
            child.kill()?;
            child.wait()?;
            Err(error)
        }
    }
}

fn open_pidfd(child: &Child) -> io::Result<(Pid, OwnedFd)> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("impossible process ID"))?;
    Ok((pid, rustix::process::pidfd_open(pid, PidfdFlags::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (listener, _socket) = connection(&dir.path().join("s")).unwrap();
        listener.accept().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = spawn(Path::new("/no/vmctr-fsd"), &ShareSpec::new(), dir.path(), "info").unwrap_err();
        assert_eq!(error.to_string(), "cannot start /no/vmctr-fsd");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_program_that_says_nothing_has_died() {
        let dir = tempfile::tempdir().unwrap();
        let error = spawn(Path::new("/bin/false"), &ShareSpec::new(), dir.path(), "info").unwrap_err();
        // It may be gone before the order is sent.
        assert!(matches!(error, SpawnError::Died(Exit::Code(1)) | SpawnError::Control(_)), "{error}");
    }

    #[test]
    fn dropping_kills_and_reaps() {
        let (process, _) =
            start(Path::new("/bin/cat"), "info", UnixStream::pair().unwrap().0.into()).unwrap();
        let ended = Arc::clone(&process.ended);
        drop(process);
        assert!(matches!(ended.wait(), Exit::Signal(9) | Exit::Code(0)));
    }
}
