//! What the `runtime` subcommand and the processes that it forks tell PID 1, over one pipe.
//!
//! One line each, short enough that the kernel writes it in one piece (PIPE_BUF), so that lines of
//! several processes never mix:
//!
//! ```text
//!   log TEXT      detail of a failure, deepest cause first
//!   pid NUMBER    the process exists (a container's init: waits for its start)
//!   error TEXT    the process cannot run; the first one says why
//! ```
//!
//! Every holder of the pipe closes it by executing or ending: end of file after `pid` means that the
//! process runs its own program.

use std::fs::File;
use std::io::Write;
use std::os::fd::RawFd;

use rustix::process::Pid;

/// Longest line with its newline; below PIPE_BUF (4096).
const MAX_LINE: usize = 3072;
/// Lines that a reader keeps.
const MAX_LOGS: usize = 8;

/// The writing side; lives as long as the process.
#[derive(Clone, Copy)]
pub struct Reporter(&'static File);

impl Reporter {
    /// Takes over the pipe that PID 1 passed under this number.
    pub fn inherit(fd: RawFd) -> Option<Self> {
        let pipe = File::options().write(true).open(format!("/proc/self/fd/{fd}")).ok()?;
        Some(Self(Box::leak(Box::new(pipe))))
    }

    /// Detail of a failure.
    pub fn log(self, text: &str) {
        self.line("log", text);
    }

    /// The process exists.
    pub fn pid(self, pid: Pid) {
        self.line("pid", &pid.as_raw_nonzero().to_string());
    }

    /// The process cannot run.
    pub fn error(self, text: &str) {
        self.line("error", text);
    }

    fn line(mut self, kind: &str, text: &str) {
        // When PID 1 no longer listens there is nobody left to tell.
        let _ = self.0.write_all(encode(kind, text).as_bytes());
    }
}

fn encode(kind: &str, text: &str) -> String {
    let mut line = format!("{kind} {}", text.replace(['\n', '\r'], " "));
    let end = line.floor_char_boundary(MAX_LINE - 1);
    line.truncate(end);
    line.push('\n');
    line
}

/// What the lines so far amount to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The process, once it exists.
    pub pid: Option<Pid>,
    /// Why it cannot run.
    pub error: Option<String>,
    logs: Vec<String>,
}

impl Report {
    /// Takes one line without its newline; what no version of the subcommand writes is ignored.
    pub fn take(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("pid", number)) => self.pid = number.parse().ok().and_then(Pid::from_raw),
            Some(("error", text)) if self.error.is_none() => self.error = Some(text.to_owned()),
            Some(("log", text)) if self.logs.len() < MAX_LOGS => self.logs.push(text.to_owned()),
            _ => {}
        }
    }

    /// All details, in the order in which they were logged.
    pub fn logs(&self) -> impl Iterator<Item = &str> {
        self.logs.iter().map(String::as_str)
    }

    /// The failure in one line. Of the details the first names the thing, the next the cause.
    pub fn failure(&self) -> String {
        let error = self.error.as_deref().unwrap_or("the runtime process ended without an answer");
        if self.logs.is_empty() || error.starts_with("exec: ") {
            return error.to_owned();
        }
        let details = &self.logs[..self.logs.len().min(2)];
        format!("{error} ({})", details.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn report(lines: &[&str]) -> Report {
        let mut report = Report::default();
        lines.iter().for_each(|line| report.take(line));
        report
    }

    #[test]
    fn the_first_error_and_its_details_are_told() {
        let failed = report(&["log mount /x", "log ENOENT", "log more", "error mounting", "error other"]);
        assert_eq!(failed.failure(), "mounting (mount /x; ENOENT)");
        assert_eq!(report(&[]).failure(), "the runtime process ended without an answer");
        let missing = report(&["log executor failed", "error exec: \"x\": not found"]);
        assert_eq!(missing.failure(), "exec: \"x\": not found");
    }

    #[test]
    fn a_pid_is_a_positive_number() {
        assert_eq!(report(&["pid 17"]).pid, Pid::from_raw(17));
        assert_eq!(report(&["pid x"]).pid, None);
        assert_eq!(report(&["pid 0", "nonsense"]).pid, None);
    }

    proptest! {
        #[test]
        fn any_text_is_one_bounded_line(text: String, times in 1_usize..200) {
            let line = encode("error", &text.repeat(times));
            prop_assert!(line.len() <= MAX_LINE);
            prop_assert_eq!(line.find('\n'), Some(line.len() - 1));
        }
    }
}
