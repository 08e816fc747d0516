//! What a program that uses a rig does when it is told to end: everything of the rig goes with it.
//!
//! ```text
//!   SIGINT, SIGTERM, SIGHUP ──> watcher: kills all that carries the rig's tag, again and again
//!                                  └──> the program's next command fails ──> it unwinds ──> the rig wipes the rest
//! ```
//!
//! Tests have no need of it: whoever interrupts them sees to what they leave.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use super::command::POLL;
use super::scope;

static HAPPENED: AtomicBool = AtomicBool::new(false);

/// Signals that end the program, from now on only through [`watch`]: to be called before any thread is started.
pub fn hold_back() -> SigSet {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().expect("the set is valid");
    signals
}

/// Ends everything that carries the tag when one of the signals comes, or came since they are held back.
pub fn watch(signals: SigSet, tag: &str) {
    let tag = tag.to_owned();
    thread::spawn(move || {
        signals.wait().expect("the set is valid");
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
