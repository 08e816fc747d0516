//! Scripts in a container of which the part after `ready` is timed from outside: a guest's clock is its own.

use std::io::{self, Read};
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use vmctr_tests::rig::command::Running;
use vmctr_tests::rig::container::Container;

/// What is read or written at once.
pub const BLOCK: usize = 64 * 1024;

/// A script that has said `ready`.
pub struct Script {
    running: Running,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    since: Instant,
}

impl Script {
    /// Starts it as a further process and returns when it is ready.
    pub fn start(container: &Container, script: &str) -> Self {
        let script = format!("echo ready; {script}");
        let mut exec = container.exec_command("bench", &[], &["/bin/sh", "-c", &script]);
        let mut running = Running::start_with(exec.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let (stdin, mut stdout) = (running.stdin(), running.stdout());
        expect(&mut stdout, "ready\n");
        Self { running, stdin: Some(stdin), stdout, since: Instant::now() }
    }

    /// Its standard input, once; dropped, it ends.
    pub fn stdin(&mut self) -> ChildStdin {
        self.stdin.take().expect("taken once")
    }

    /// Reads so many bytes; how long they took from the script's being ready.
    pub fn read(&mut self, bytes: u64) -> Duration {
        let read = io::copy(&mut self.stdout.by_ref().take(bytes), &mut io::sink()).expect("readable");
        let took = self.since.elapsed();
        assert_eq!(read, bytes, "the container's output ended early");
        took
    }

    /// Waits until it says `done`; how long it took from its being ready.
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
