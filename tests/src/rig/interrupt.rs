//! What a program that uses a rig does when it is told to end: everything of the rig goes with it.
//!
//! ```text
//!   SIGINT, SIGTERM, SIGHUP, time limit ──> watcher: kills all that carries the rig's tag, again and again
//!     └──> the program's next command fails ──> it unwinds ──> the rig wipes the rest
//! ```
//!
//! Tests have no need of it: whoever interrupts them sees to what they leave.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::alarm;

use super::command::POLL;
use super::scope;

static HAPPENED: AtomicBool = AtomicBool::new(false);

/// Signals that end the program, from now on only through [`watch`], and one of them comes after so many seconds.
/// To be called before any thread is started.
pub fn hold_back(limit: u32) -> SigSet {
    let ends = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGALRM];
    let signals: SigSet = ends.into_iter().collect();
    signals.thread_block().expect("the set is valid");
    alarm::set(limit);
    signals
}

/// Ends everything that carries the tag when one of the signals comes, or came since they are held back.
pub fn watch(signals: SigSet, tag: &str) {
    let tag = tag.to_owned();
    thread::spawn(move || {
        let signal = signals.wait().expect("the set is valid");
        eprintln!("{}: ending", if signal == Signal::SIGALRM { "Too late" } else { signal.as_str() });
        HAPPENED.store(true, Ordering::Relaxed);
        loop {
            scope::kill_all(&tag);
            thread::sleep(POLL);
        }
    });
}

/// Whether a signal came.
pub fn happened() -> bool {
    HAPPENED.load(Ordering::Relaxed)
}
