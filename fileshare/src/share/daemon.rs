//! The daemon's life, from its order on the control socket to its exit.
//!
//! ```text
//!   supervisor (the process that spawn() reports)      server (its child, PID 1 of a namespace of its own)
//!   ──────────                                         ──────
//!   receive the order, leave the host's namespaces
//!   fork ────────────────────────────────────────────> open sources, build and enter the share root
//!   give up all rights                                 give up rights, load seccomp
//!   wait                                               answer "ready"; serve until QEMU hangs up
//!   exit as the server did  <───────────────────────── exit
//! ```
//!
//! Invariant: neither outlives the other, nor the thread that started the supervisor. The kernel kills the
//! server with the supervisor and the supervisor with its parent (PR_SET_PDEATHSIG).

use std::error::Error as StdError;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::Error::HandleRequest;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::vhost_user::{VhostUserFsBackend, VhostUserFsBackendBuilder};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::control::{self, ControlError};
use super::fs::{Limits, Places, ShareFs, TopPlaces};
use super::mounts::{MountError, SHARE, ShareRoot, TOP, VOLUMES};
use super::sandbox::{self, Role, SandboxError};
use super::sources::{SourceError, Sources};
use super::spec::{ShareSpec, SpecError};
use super::sys::{self, Forked};

/// Requests are handled one after another by the thread that reads the queue. On a guest with one or two
/// CPUs a pool only adds a hand-over to each request.
const POOL_THREADS: usize = 0;

/// Descriptors that the daemon needs for itself: one for each memory region that QEMU may announce (509), one
/// for the request in hand, and change.
const OWN_DESCRIPTORS: u64 = 509 + 1 + 100;

/// With fewer the guest could not even mount an overlay.
const FEWEST_GUEST_DESCRIPTORS: u64 = 128;

/// Descriptors from here on are not standard input, output and error.
const FIRST_PRIVATE_FD: u32 = 3;

/// Exit status that stands for death by signal N is this plus N, as in a shell.
const SIGNAL_EXIT: i32 = 128;

/// The daemon could not start, or stopped before its time.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// No understandable order.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The order is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A path in it cannot be shared.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The share root cannot be built.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The process cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The kernel refused something else.
    #[error("cannot {step}")]
    Step {
        /// What failed.
        step: &'static str,
        /// The cause.
        #[source]
        cause: io::Error,
    },
    /// The limit on open files leaves none for the guest.
    #[error("the limit on open files is {limit}; at least {needed} are needed: raise RLIMIT_NOFILE")]
    FewDescriptors {
        /// RLIMIT_NOFILE.
        limit: u64,
        /// The least that works.
        needed: u64,
    },
    /// QEMU and the daemon did not understand each other.
    #[error("vhost-user: {0}")]
    VhostUser(String),
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> DaemonError {
    move |cause| DaemonError::Step { step, cause: cause.into() }
}

/// Makes stdin, which must be the control socket, unreachable for the rest of the process and returns it. No
/// descriptor but the three standard ones survives: what the caller left open is not the daemon's to hold.
///
/// # Errors
/// As the system calls do.
pub fn take_control() -> Result<OwnedFd, DaemonError> {
    sys::close_from(FIRST_PRIVATE_FD).map_err(step("close inherited descriptors"))?;
    let stdin = io::stdin();
    let control = stdin.as_fd().try_clone_to_owned().map_err(step("take over stdin"))?;
    let null = File::open("/dev/null").map_err(step("open /dev/null"))?;
    rustix::stdio::dup2_stdin(null).map_err(step("replace stdin"))?;
    Ok(control)
}

/// Runs the daemon to its end; `control` is the socket that [`super::spawn`] talks to. Both the supervisor and
/// the server return from here. The value is the exit status.
///
/// # Errors
/// Why the daemon did not start or did not go on. If it was the start, the caller has been told.
pub fn run(control: OwnedFd) -> Result<i32, DaemonError> {
    let mut control = UnixStream::from(control);
    let side = divide(&mut control);
    match told(&control, side)? {
        Side::Supervisor(server) => {
            // The server answers. Should it die, the caller must see the socket close.
            drop(control);
            sandbox::confine(Role::Supervisor)?;
            wait_for(server)
        }
        Side::Server(order) => {
            let fs = prepare(&order.spec);
            let mut daemon = told(&control, fs.and_then(attach))?;
            control::send_ready(&control).map_err(step("answer the caller"))?;
            drop(control);
            serve(&mut daemon, order.listener)?;
            Ok(0)
        }
    }
}

/// Passes a result on, and an error also to the caller.
fn told<T>(control: &UnixStream, result: Result<T, DaemonError>) -> Result<T, DaemonError> {
    if let Err(error) = &result
        && let Err(lost) = control::send_error(control, &chain(error))
    {
        tracing::warn!("cannot tell the caller: {lost}");
    }
    result
}

/// One line with an error and all its causes.
fn chain(error: &dyn StdError) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

struct Order {
    spec: ShareSpec,
    listener: UnixListener,
}

enum Side {
    Supervisor(Pid),
    Server(Order),
}

/// Receives the order and becomes two processes.
fn divide(control: &mut UnixStream) -> Result<Side, DaemonError> {
    die_with_parent()?;
    let (spec, listener) = control::receive_order(control)?;
    spec.validate()?;
    let supervisor = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
        .map_err(step("watch the supervisor"))?;
    sandbox::isolate()?;
    match sys::fork().map_err(step("fork"))? {
        Forked::Parent(server) => Ok(Side::Supervisor(server)),
        Forked::Child => {
            die_with_parent()?;
            check_alive(&supervisor)?;
            Ok(Side::Server(Order { spec, listener }))
        }
    }
}

fn die_with_parent() -> Result<(), DaemonError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(step("bind to the parent's life"))
}

/// The parent may have died before its death was tied to ours.
fn check_alive(parent: &OwnedFd) -> Result<(), DaemonError> {
    let mut fds = [PollFd::new(parent, PollFlags::IN)];
    match poll(&mut fds, Some(&Timespec::default())).map_err(step("watch the supervisor"))? {
        0 => Ok(()),
        _ => Err(step("go on without the supervisor")(io::Error::from(io::ErrorKind::BrokenPipe))),
    }
}

/// From the host's view to a confined process with the share root as its world.
fn prepare(spec: &ShareSpec) -> Result<ShareFs, DaemonError> {
    let guest_fds = guest_descriptors()?;
    let sources = Sources::open(spec)?;
    let one_filesystem = sources.one_filesystem();
    let mut root = ShareRoot::build(&sources)?;
    drop(sources);
    let proc_self_fd = Some(root.enter()?);
    sandbox::confine(Role::Server)?;
    let writable = std::mem::take(&mut root.writable);
    let limits = Limits { used_by: spec.used_by, guest_fds, one_filesystem, proc_self_fd, writable };
    ShareFs::new(&places(&root), limits).map_err(step("open the share root"))
}

fn places(root: &ShareRoot) -> Places {
    let top = root.upper.clone().zip(root.work.clone());
    Places {
        share: SHARE.into(),
        top: top.map(|(upper, work)| TopPlaces { parent: TOP.into(), upper, work }),
        volumes: root.has_volumes.then(|| VOLUMES.into()),
    }
}

/// Raises the limit on open files and says how many of them the guest may use up.
fn guest_descriptors() -> Result<u64, DaemonError> {
    let limit = virtiofsd::limits::setup_rlimit_nofile(None)
        .map_err(|text| step("raise the limit on open files")(io::Error::other(text)))?;
    match limit.checked_sub(OWN_DESCRIPTORS) {
        Some(guest) if guest >= FEWEST_GUEST_DESCRIPTORS => Ok(guest),
        _ => Err(DaemonError::FewDescriptors { limit, needed: OWN_DESCRIPTORS + FEWEST_GUEST_DESCRIPTORS }),
    }
}

type Daemon = VhostUserDaemon<Arc<VhostUserFsBackend<ShareFs>>>;

fn attach(fs: ShareFs) -> Result<Daemon, DaemonError> {
    let backend = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(POOL_THREADS)
        .build(fs)
        .map_err(|error| DaemonError::VhostUser(error.to_string()))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    VhostUserDaemon::new("vhost-user".to_owned(), Arc::new(backend), memory)
        .map_err(|error| DaemonError::VhostUser(error.to_string()))
}

/// Serves the one connection that waits at `listener` until its other end closes.
fn serve(daemon: &mut Daemon, listener: UnixListener) -> Result<(), DaemonError> {
    let fail = |error: vhost_user_backend::Error| DaemonError::VhostUser(error.to_string());
    daemon.start(&mut Listener::from(listener)).map_err(fail)?;
    tracing::info!("serving");
    match daemon.wait() {
        Ok(()) | Err(HandleRequest(VhostUserError::Disconnected | VhostUserError::PartialMessage)) => {
            tracing::info!("QEMU closed the connection");
            Ok(())
        }
        Err(error) => Err(fail(error)),
    }
}

fn wait_for(server: Pid) -> Result<i32, DaemonError> {
    let waited = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(server), WaitOptions::empty()));
    let Some((_, status)) = waited.map_err(step("wait for the server"))? else { return Ok(SIGNAL_EXIT) };
    if let Some(signal) = status.terminating_signal() {
        tracing::error!("share server was killed by signal {signal}");
        return Ok(SIGNAL_EXIT + signal);
    }
    Ok(status.exit_status().unwrap_or(SIGNAL_EXIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_cause_once() {
        let cause = io::Error::from_raw_os_error(libc::ENOENT);
        let error = DaemonError::Mount(MountError::Bind { path: "/x".into(), cause });
        assert_eq!(chain(&error), "cannot bind-mount /x: No such file or directory (os error 2)");
    }
}
