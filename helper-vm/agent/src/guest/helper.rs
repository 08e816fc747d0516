//! A `runtime` helper as PID 1 sees it: spawned, listened to, never waited for (the reaper does).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines, Take};
use tokio::net::unix::pipe::Receiver;

use crate::boot::console;
use crate::runtime::report::Report;
use crate::runtime::{CREATE, EXEC, SUBCOMMAND};
use crate::stdio::process::ProcessEnds;
use crate::sys::{self, Signal};

/// The agent itself, whatever its path in the initramfs was.
const SELF: &str = "/proc/self/exe";
/// How long a helper, and then the program's start, may take; the share may be slow.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// Bytes that a report may have.
const MAX_REPORT: u64 = 64 << 10;

/// A process could not be built or started.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The program cannot run; in the words of other runtimes.
    #[error("{0}")]
    Program(String),
    #[error("the runtime failed: {0}")]
    Failed(String),
    #[error("the runtime did not finish within {} s", TIME_LIMIT.as_secs())]
    TimeLimit,
    #[error("talking to the runtime")]
    Io(#[from] io::Error),
}

/// What a helper builds.
#[derive(Clone, Copy, Debug)]
pub enum Verb {
    /// A container's init process.
    Create,
    /// A further process.
    Exec,
}

/// The names under which files and libcontainer know a process.
#[derive(Clone, Debug)]
pub struct Names {
    /// Short name of the container.
    pub container: String,
    /// Short name of the process.
    pub process: String,
}

/// A helper at work, and after it the process that it left, until that executes its program.
pub struct Helper {
    pid: Option<Pid>,
    lines: Lines<BufReader<Take<Receiver>>>,
    report: Report,
}

impl Helper {
    /// Spawns a helper whose standard streams are the future process's. Only the actor may call it: the
    /// report pipe is open for inheritance meanwhile.
    pub fn spawn(verb: Verb, names: &Names, terminal: bool, ends: ProcessEnds) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let lines = BufReader::new(Receiver::from_owned_fd(reader)?.take(MAX_REPORT)).lines();
        fcntl_setfd(&writer, FdFlags::empty())?;
        let pid = command(verb, names, terminal, &writer, ends).spawn()?.id();
        Ok(Self { pid: i32::try_from(pid).ok().and_then(Pid::from_raw), lines, report: Report::default() })
    }

    /// Waits until the process exists.
    pub async fn ready(&mut self) -> Result<Pid, HelperError> {
        match tokio::time::timeout(TIME_LIMIT, self.read_until_pid()).await {
            Ok(outcome) => outcome,
            Err(_) => {
                self.kill();
                Err(HelperError::TimeLimit)
            }
        }
    }

    /// Waits until the process executes its program.
    pub async fn executed(mut self) -> Result<(), HelperError> {
        let end = async {
            while let Some(line) = self.lines.next_line().await? {
                self.report.take(&line);
            }
            if self.report.error.is_some() { Err(self.failure()) } else { Ok(()) }
        };
        tokio::time::timeout(TIME_LIMIT, end).await.unwrap_or(Err(HelperError::TimeLimit))
    }

    async fn read_until_pid(&mut self) -> Result<Pid, HelperError> {
        while let Some(line) = self.lines.next_line().await? {
            self.report.take(&line);
            if self.report.error.is_some() {
                break;
            }
            if let Some(pid) = self.report.pid {
                return Ok(pid);
            }
        }
        Err(self.failure())
    }

    fn failure(&self) -> HelperError {
        let text = self.report.failure();
        if text.starts_with("exec: ") {
            return HelperError::Program(text);
        }
        self.report.logs().for_each(console::warn);
        HelperError::Failed(text)
    }

    fn kill(&self) {
        if let Some(pid) = self.pid {
            // It may have ended already.
            let _ = sys::kill(pid, Signal::KILL);
        }
    }
}

fn command(verb: Verb, names: &Names, terminal: bool, report: &OwnedFd, ends: ProcessEnds) -> Command {
    let verb = match verb {
        Verb::Create => CREATE,
        Verb::Exec => EXEC,
    };
    let mode = if terminal { "terminal" } else { "pipes" };
    let report = report.as_raw_fd().to_string();
    let [stdin, stdout, stderr] = ends.map(Stdio::from);
    let mut command = Command::new(SELF);
    command.args([SUBCOMMAND, verb, &names.container, &names.process, mode, &report]);
    command.env_clear().current_dir("/").stdin(stdin).stdout(stdout).stderr(stderr);
    command
}
