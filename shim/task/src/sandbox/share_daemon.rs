//! The share daemon as the session sees it: started off the async threads, its log passed on line by line,
//! its end a future.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::ChildStderr;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tracing::{Span, debug, error, info, trace, warn};
use vmctr_fileshare::share::{Connection, Exit, Fsd, ShareSpec, SpawnError, spawn_on};
use vmctr_vmm::LogRate;
use vmctr_vmm::binaries::{self, BinaryError};

use crate::sys;

const BINARY: &str = "vmctr-fsd";

/// A log line is cut here: the daemon works on what a hostile guest sends.
const LINE_LIMIT: u64 = 2048;

/// The daemon cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It is not installed.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// It does not start, or it cannot share what it should.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The system gives no descriptor or thread.
    #[error("Cannot watch the share daemon")]
    Watch(#[source] io::Error),
}

/// A running daemon; clones are the same. The last one's drop kills it.
#[derive(Clone, Debug)]
pub struct ShareDaemon(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fsd: Fsd,
    pidfd: AsyncFd<OwnedFd>,
}

impl ShareDaemon {
    /// Starts it for `spec` on a connection whose other end QEMU has or gets.
    pub async fn start(
        spec: ShareSpec,
        connection: Connection,
        log_level: &'static str,
    ) -> Result<Self, ShareError> {
        let started = spawn_blocking(move || {
            let binary = binaries::find(BINARY)?;
            Ok::<_, ShareError>(spawn_on(&binary, &spec, connection, log_filter(log_level))?)
        });
        let mut fsd = started.await.map_err(|error| ShareError::Watch(error.into()))??;
        let pidfd = fsd.pidfd().try_clone_to_owned().map_err(ShareError::Watch)?;
        let pidfd = sys::watch_readable(pidfd).map_err(ShareError::Watch)?;
        if let Some(stderr) = fsd.stderr.take() {
            forward_log(stderr).map_err(ShareError::Watch)?;
        }
        Ok(Self(Arc::new(Inner { fsd, pidfd })))
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.0.fsd.pid()
    }

    /// Returns how the daemon has ended, when it has.
    pub async fn ended(&self) -> Exit {
        // A descriptor that cannot be watched is as bad as a daemon that is gone.
        let _ = self.0.pidfd.readable().await;
        let fsd = self.0.clone();
        spawn_blocking(move || fsd.fsd.wait()).await.unwrap_or(Exit::Unknown)
    }

    /// Kills it and waits for its end. Blocks for a moment.
    pub fn stop(&self) -> io::Result<()> {
        self.0.fsd.kill()?;
        let exit = self.0.fsd.wait();
        debug!("The share daemon ended ({exit})");
        Ok(())
    }
}

/// virtiofsd's debug lines tell of every single request: who wants them asks for "trace".
fn log_filter(level: &'static str) -> &'static str {
    if level == "debug" { "debug,virtiofsd=info" } else { level }
}

fn forward_log(stderr: ChildStderr) -> io::Result<()> {
    let span = Span::current();
    let forward = move || {
        let _in_span = span.enter();
        // The end of the stream is the end of the daemon, which is watched elsewhere.
        let _ = log_lines(BufReader::new(stderr), log_line);
    };
    thread::Builder::new().name("fsd-log".to_owned()).spawn(forward).map(drop)
}

/// Reads on whatever comes, so that the daemon never waits; what is too much is counted.
fn log_lines(mut from: impl BufRead, mut log: impl FnMut(&str)) -> io::Result<()> {
    let mut rate = LogRate::new(Instant::now());
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut from).take(LINE_LIMIT).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        rate.admit(Instant::now(), String::from_utf8_lossy(&line).trim()).for_each(|line| log(&line));
    }
}

/// The daemon writes the level first.
fn log_line(line: &str) {
    let (level, text) = line.split_once(' ').unwrap_or(("", line));
    let text = text.trim_start();
    match level {
        "ERROR" => error!(target: "fsd", "{text}"),
        "WARN" => warn!(target: "fsd", "{text}"),
        "INFO" => info!(target: "fsd", "{text}"),
        "DEBUG" => debug!(target: "fsd", "{text}"),
        "TRACE" => trace!(target: "fsd", "{text}"),
        _ if line.is_empty() => {}
        _ => warn!(target: "fsd", "{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_does_not_reach_the_log_as_a_whole() {
        const LINES: usize = 100_000;
        let flood = "ERROR the guest speaks nonsense\n".repeat(LINES);
        let mut logged = 0;
        log_lines(flood.as_bytes(), |_| logged += 1).unwrap();
        // What may pass meanwhile depends on the time that this takes.
        assert!((1000..LINES / 2).contains(&logged), "{logged} lines");
    }

    #[test]
    fn a_few_lines_all_do() {
        let mut logged = vec![];
        log_lines(&b"INFO serving\n WARN odd\n"[..], |line| logged.push(line.to_owned())).unwrap();
        assert_eq!(logged, ["INFO serving", "WARN odd"]);
    }
}
