//! Scripts in a container, timed from outside, as a guest's clock is its own: from the line that lets them go on to
//! what they write.
//!
//! ```text
//!   script   echo ready ── read go ── ... the work ... ── output
//!   here          └──> write go, clock starts              └──> clock read
//! ```

use std::io::{self, Read, Write};
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use vmctr_tests::rig::command::Running;
use vmctr_tests::rig::container::Container;

/// What is read or written at once.
pub const BLOCK: usize = 64 * 1024;

/// A script at work.
pub struct Script {
    running: Running,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    since: Instant,
}

impl Script {
    /// Starts it as a further process and lets it go on when it is ready.
    pub fn start(container: &Container, script: &str) -> Self {
        let script = format!("echo ready; read go; {script}");
        let mut exec = container.exec_command("bench", &[], &["/bin/sh", "-c", &script]);
        let mut running = Running::start_with(exec.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let (mut stdin, mut stdout) = (running.stdin(), running.stdout());
        expect(&mut stdout, "ready\n");
        let since = Instant::now();
        stdin.write_all(b"go\n").expect("the script reads");
        Self { running, stdin: Some(stdin), stdout, since }
    }

    /// Its standard input, once; dropped, it ends.
    pub fn stdin(&mut self) -> ChildStdin {
        self.stdin.take().expect("taken once")
    }

    /// Reads so many bytes; how long it took until they were there.
    pub fn read(&mut self, bytes: u64) -> Duration {
        let read = io::copy(&mut self.stdout.by_ref().take(bytes), &mut io::sink()).expect("readable");
        let took = self.since.elapsed();
        assert_eq!(read, bytes, "the container's output ended early");
        took
    }

    /// Waits until it says `done`; how long that took.
    pub fn done(&mut self) -> Duration {
        expect(&mut self.stdout, "done\n");
        self.since.elapsed()
    }

    /// Its end, which must be a good one.
    pub fn finish(mut self) {
        drop(self.stdin.take());
        io::copy(&mut self.stdout, &mut io::sink()).expect("readable");
        self.running.finish().ok();
    }
}

/// Runs a script to its end; how long it took.
pub fn timed(container: &Container, script: &str) -> Duration {
    let mut script = Script::start(container, &format!("{script} && echo done"));
    let took = script.done();
    script.finish();
    took
}

fn expect(from: &mut impl Read, text: &str) {
    let mut read = vec![0; text.len()];
    let got = from.read_exact(&mut read);
    assert!(got.is_ok() && read == text.as_bytes(), "{text:?} was to come, not {read:?} ({got:?})");
}
