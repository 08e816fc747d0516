//! PID 1 reaps every orphan of the guest.
//!
//! A process may end before its helper has told its number: while helpers work, exits of unknown
//! processes are kept for whoever claims them; with no helper at work they are orphans and forgotten.

use std::collections::HashMap;

use rustix::process::{Pid, WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};

use super::Handle;

/// Exits kept for helpers that are at work; far more than helpers fork.
const MAX_UNCLAIMED: usize = 4096;

/// Exits that belong to nobody yet.
#[derive(Debug, Default)]
pub struct Reaper {
    helpers: usize,
    unclaimed: HashMap<Pid, u32>,
}

impl Reaper {
    /// A helper begins, which will tell of a process.
    pub fn helper_begins(&mut self) {
        self.helpers += 1;
    }

    /// A helper has told of its process, or failed.
    pub fn helper_ends(&mut self) {
        self.helpers = self.helpers.saturating_sub(1);
        if self.helpers == 0 {
            self.unclaimed.clear();
        }
    }

    /// An unknown process ended.
    pub fn unclaimed(&mut self, pid: Pid, status: u32) {
        if self.helpers > 0 && self.unclaimed.len() < MAX_UNCLAIMED {
            self.unclaimed.insert(pid, status);
        }
    }

    /// The exit of a process that has ended before it became known.
    pub fn claim(&mut self, pid: Pid) -> Option<u32> {
        self.unclaimed.remove(&pid)
    }
}

/// Reaps at every SIGCHLD, inside the actor.
pub fn watch(guest: Handle) -> std::io::Result<()> {
    let mut children = signal(SignalKind::child())?;
    tokio::spawn(async move {
        while children.recv().await.is_some() {
            guest
                .call(|guest| {
                    for (pid, status) in ended() {
                        guest.exited(pid, status);
                    }
                })
                .await;
        }
    });
    Ok(())
}

fn ended() -> Vec<(Pid, u32)> {
    let mut ended = Vec::new();
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        let status = exit_status(status.exit_status(), status.terminating_signal());
        ended.extend(status.map(|status| (pid, status)));
    }
    ended
}

/// The exit code, or 128 + signal.
fn exit_status(code: Option<i32>, signal: Option<i32>) -> Option<u32> {
    let status = code.or(signal.map(|signal| signal + 128))?;
    u32::try_from(status).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }

    #[test]
    fn an_exit_before_the_helpers_answer_is_kept() {
        let mut reaper = Reaper::default();
        reaper.unclaimed(pid(5), 1);
        assert_eq!(reaper.claim(pid(5)), None);
        reaper.helper_begins();
        reaper.helper_begins();
        reaper.unclaimed(pid(6), 3);
        reaper.helper_ends();
        assert_eq!(reaper.claim(pid(6)), Some(3));
        reaper.unclaimed(pid(7), 3);
        reaper.helper_ends();
        assert_eq!(reaper.claim(pid(7)), None);
    }

    #[test]
    fn a_signal_is_told_as_128_more() {
        assert_eq!(exit_status(Some(3), None), Some(3));
        assert_eq!(exit_status(None, Some(9)), Some(137));
    }
}
