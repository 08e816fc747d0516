//! What a command takes besides its time: processors and memory.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use vmctr_tests::rig::proc::status_field;

/// How often the memory is looked at.
const LOOK: Duration = Duration::from_millis(3);

/// A command that succeeded.
pub struct Used {
    /// What it printed.
    pub stdout: Vec<u8>,
    /// From start to end.
    pub seconds: f64,
    /// Processor time by time: its own and that of processes that it waited for.
    pub cores: f64,
    /// The most memory that it held at a time, in bytes.
    pub peak: u64,
}

impl Used {
    /// Runs a command to its end; nothing else that is waited for may run meanwhile.
    pub fn by(command: &mut Command) -> Self {
        let (before, begun) = (processor_seconds(), Instant::now());
        let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = piped.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        let pid = child.id();
        let watch = thread::spawn(move || peak_until_end(pid));
        let done = child.wait_with_output().expect("the child is ours");
        let seconds = begun.elapsed().as_secs_f64();
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
        let peak = watch.join().expect("looking does not panic");
        Self { stdout: done.stdout, seconds, cores: (processor_seconds() - before) / seconds, peak }
    }
}

/// The kernel keeps the most: only what comes within the last look is missed.
fn peak_until_end(pid: u32) -> u64 {
    let mut most = 0;
    while let Some(peak) = peak(pid) {
        most = peak;
        thread::sleep(LOOK);
    }
    most
}

/// The most memory that a process has held so far, in bytes; `None` when it has ended.
pub fn peak(pid: u32) -> Option<u64> {
    let field = status_field(pid, "VmHWM")?;
    let kib: u64 = field.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Of all children that were waited for.
fn processor_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("a process may ask for its own");
    (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
}
