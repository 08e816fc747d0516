//! The logging program of a `binary:` URI: a child that reads the process's output on descriptors 3 and 4
//! and closes descriptor 5 when it is ready.
//!
//! It ends by itself when both outputs are closed; one that does not is told to (SIGTERM), then made to.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tracing::warn;

use super::uri::Program;
use super::wait::{Cancel, Woken};
use crate::sys;

/// How long the program may take to get ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// Between the end of the output and SIGTERM, and between that and SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(5);

/// The running program and the pipes that lead to it.
#[derive(Debug)]
pub struct Logger {
    /// The program.
    pub child: LoggerChild,
    /// Its descriptor 3.
    pub stdout: File,
    /// Its descriptor 4.
    pub stderr: File,
}

/// The program without its pipes.
#[derive(Debug)]
pub struct LoggerChild {
    child: Child,
    pidfd: OwnedFd,
}

/// Starts the program and waits until it is ready.
pub fn start(program: &Program, id: &str, namespace: &str) -> io::Result<Logger> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (out_read, out_write) = pipe()?;
    let (err_read, err_write) = pipe()?;
    let (ready_read, ready_write) = pipe()?;
    let mut command = Command::new(&program.path);
    command.args(&program.args).env_clear();
    command.env("CONTAINER_ID", id).env("CONTAINER_NAMESPACE", namespace);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sys::pass_from_3(&mut command, [out_read, err_read, ready_write])?;
    let child = LoggerChild::new(command.spawn()?)?;
    // The command still owns the child's ends; while it lives no end of file comes through.
    drop(command);
    let logger = Logger { child, stdout: writer(out_write)?, stderr: writer(err_write)? };
    match wait_ready(ready_read) {
        Ok(()) => Ok(logger),
        Err(error) => {
            logger.child.kill();
            Err(error)
        }
    }
}

fn writer(pipe: OwnedFd) -> io::Result<File> {
    rustix::io::ioctl_fionbio(&pipe, true)?;
    Ok(pipe.into())
}

fn wait_ready(ready: OwnedFd) -> io::Result<()> {
    let mut ready = File::from(ready);
    if Cancel::new()?.wait(&[(&ready, PollFlags::IN)], Some(READY_LIMIT))? == Woken::Timeout {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the program did not get ready"));
    }
    ready.read(&mut [0]).map(drop)
}

impl LoggerChild {
    fn new(child: Child) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
        Ok(Self { pidfd: pidfd_open(pid, PidfdFlags::empty())?, child })
    }

    /// Waits until it ends; after `cancel` it has little time left to do so.
    pub fn reap(mut self, cancel: &Cancel) {
        if !self.ended(cancel, None) {
            self.end();
        }
        match self.child.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => warn!("Logging program ended with {status}"),
            Err(error) => warn!("Logging program cannot be waited for: {error}"),
        }
    }

    fn end(&self) {
        let Ok(never) = Cancel::new() else { return self.signal(Signal::KILL) };
        for signal in [Signal::TERM, Signal::KILL] {
            if self.ended(&never, Some(END_LIMIT)) {
                return;
            }
            self.signal(signal);
        }
    }

    fn ended(&self, cancel: &Cancel, limit: Option<Duration>) -> bool {
        matches!(cancel.wait(&[(&self.pidfd, PollFlags::IN)], limit), Ok(Woken::Ready))
    }

    fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    fn kill(mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}
