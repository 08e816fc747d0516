//! Commands with a time limit, and what they left: output, status, and assertions on both that say everything
//! when they fail.

use std::ffi::OsStr;
use std::fmt;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What any one command may take: a VM boots in seconds even when two share two emulated CPUs, so a command
/// that needs this long hangs.
pub const TIME_LIMIT: Duration = Duration::from_secs(150);

/// How often a wait looks again.
pub const POLL: Duration = Duration::from_millis(10);

/// A command that ended.
#[derive(Clone)]
pub struct Output {
    command: String,
    status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
}

/// A command that runs; ended when dropped.
pub struct Running {
    command: String,
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    started: Instant,
}

/// Runs a command to its end with nothing on stdin.
pub fn run(command: &mut Command) -> Output {
    Running::start(command.stdin(Stdio::null())).finish()
}

impl Running {
    /// Starts a command whose stdout and stderr are collected.
    pub fn start(command: &mut Command) -> Self {
        let mut running = Self::start_with(command.stdout(Stdio::piped()));
        running.stdout = running.child.stdout.take().map(collect);
        running
    }

    /// Starts a command with stdout as the caller has set it; stderr is collected.
    pub fn start_with(command: &mut Command) -> Self {
        let text = describe(command);
        let mut child =
            command.stderr(Stdio::piped()).spawn().unwrap_or_else(|e| panic!("cannot start {text}: {e}"));
        let stderr = child.stderr.take().map(collect);
        Self { command: text, child, stdout: None, stderr, started: Instant::now() }
    }

    /// The write end of its stdin, which was piped.
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("stdin is piped")
    }

    /// The read end of its stdout, which was piped and is not collected.
    pub fn stdout(&mut self) -> std::process::ChildStdout {
        self.child.stdout.take().expect("stdout is piped and not collected")
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end, but not for ever.
    pub fn finish(self) -> Output {
        self.finish_within(TIME_LIMIT)
    }

    /// Waits for its end at most this long.
    pub fn finish_within(mut self, limit: Duration) -> Output {
        let deadline = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait().expect("the child is ours") {
                Some(status) => break status,
                None if Instant::now() > deadline => self.give_up(limit),
                None => thread::sleep(POLL),
            }
        };
        let took = self.started.elapsed();
        let (stdout, stderr) = self.collected();
        Output { command: self.command.clone(), status, stdout, stderr, took }
    }

    fn give_up(&mut self, limit: Duration) -> ! {
        // Already ended is fine too: the message below is what counts.
        let _ = self.child.kill();
        let (stdout, stderr) = self.collected();
        panic!(
            "{} did not end within {limit:?}\n-- stdout\n{}\n-- stderr\n{}",
            self.command,
            text(&stdout),
            text(&stderr)
        );
    }

    fn collected(&mut self) -> (Vec<u8>, Vec<u8>) {
        let join = |reader: Option<JoinHandle<Vec<u8>>>| {
            reader.map(|reader| reader.join().expect("the reader does not panic")).unwrap_or_default()
        };
        (join(self.stdout.take()), join(self.stderr.take()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    /// Exit code; 128 + signal when a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or_default())
    }

    /// stdout as text.
    pub fn text(&self) -> String {
        text(&self.stdout)
    }

    /// stderr as text.
    pub fn errors(&self) -> String {
        text(&self.stderr)
    }

    /// Asserts exit code 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// Asserts the exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "exit code of {self}");
        self
    }

    /// Asserts stdout, line ends at its end aside.
    #[track_caller]
    pub fn prints(self, expected: &str) -> Self {
        assert_eq!(self.text().trim_end_matches('\n'), expected, "stdout of {self}");
        self
    }

    /// Asserts a failure whose stderr names each of these.
    #[track_caller]
    pub fn fails_naming(self, names: &[&str]) -> Self {
        assert_ne!(self.code(), 0, "{self} was to fail");
        let errors = self.errors();
        for name in names {
            assert!(errors.contains(name), "stderr does not name {name:?}: {self}");
        }
        self
    }

    /// stdout as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {self}"))
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (code, out, err) = (self.code(), shortened(&self.stdout), shortened(&self.stderr));
        write!(f, "{}\n-- exit code {code}\n-- stdout\n{out}\n-- stderr\n{err}", self.command)
    }
}

/// Waits until a condition holds.
///
/// # Panics
/// When it does not within the limit.
#[track_caller]
pub fn eventually(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(POLL);
    }
}

fn collect(mut source: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is still worth showing.
        let _ = source.read_to_end(&mut bytes);
        bytes
    })
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn shortened(bytes: &[u8]) -> String {
    const MOST: usize = 8192;
    if bytes.len() <= MOST {
        return text(bytes);
    }
    format!("{}... ({} bytes)", text(&bytes[..MOST]), bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_status_are_kept() {
        let output = run(&mut sh("echo out; echo err >&2; exit 3")).exits(3).prints("out");
        assert_eq!(output.errors(), "err\n");
    }

    #[test]
    fn a_signal_is_128_and_its_number() {
        run(&mut sh("kill -9 $$")).exits(137);
    }

    #[test]
    #[should_panic(expected = "did not end within")]
    fn a_command_that_hangs_is_ended_and_reported() {
        Running::start(&mut sh("exec sleep 60")).finish_within(Duration::from_millis(50));
    }

    #[test]
    #[should_panic(expected = "does not name")]
    fn a_failure_must_name_the_thing() {
        run(&mut sh("echo other >&2; false")).fails_naming(&["thing"]);
    }
}
