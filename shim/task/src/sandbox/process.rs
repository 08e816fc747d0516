//! State machine of one process, the container's init or an exec: pure, without I/O.
//!
//! ```text
//!             start            exit
//!   Created ---------> Running ------> Stopped(exit)
//!      |              pause | ^ resume     ^
//!      |                    v |            |
//!      |                   Paused ---------+
//!      +-----------------------------------+   killed before it ran
//! ```
//!
//! Invariant: the exit is set once and never changes; whoever waits learns of it.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::error::{Result, TaskError};

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal number.
    pub status: u32,
    /// On the host's clock.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Known, not started.
    Created,
    /// Started.
    Running,
    /// Frozen with its container.
    Paused,
    /// Ended.
    Stopped(Exit),
}

impl Phase {
    /// As containerd's users name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// One process.
#[derive(Debug)]
pub struct Process {
    phase: Phase,
    exit: watch::Sender<Option<Exit>>,
}

impl Default for Process {
    fn default() -> Self {
        Self { phase: Phase::Created, exit: watch::Sender::new(None) }
    }
}

impl Process {
    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Becomes `Some` when it ends.
    pub fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// Whether it can still end.
    pub fn is_live(&self) -> bool {
        !matches!(self.phase, Phase::Stopped(_))
    }

    /// Fails unless it can be started.
    pub fn check_start(&self) -> Result<()> {
        match self.phase {
            Phase::Created => Ok(()),
            Phase::Running | Phase::Paused => Err(precondition("process is started already")),
            Phase::Stopped(_) => Err(precondition("process has exited already")),
        }
    }

    /// Fails unless signals reach it.
    pub fn check_signal(&self) -> Result<()> {
        match self.phase {
            Phase::Stopped(_) => Err(TaskError::NotFound("process already finished".into())),
            _ => Ok(()),
        }
    }

    /// Fails while it runs.
    pub fn check_delete(&self) -> Result<()> {
        match self.phase {
            Phase::Created | Phase::Stopped(_) => Ok(()),
            Phase::Running | Phase::Paused => {
                Err(precondition(format!("cannot delete a {} process", self.phase.name())))
            }
        }
    }

    /// Fails unless it runs.
    pub fn check_running(&self) -> Result<()> {
        match self.phase {
            Phase::Running => Ok(()),
            other => Err(precondition(format!("container is {}, not running", other.name()))),
        }
    }

    /// Fails unless it is paused.
    pub fn check_paused(&self) -> Result<()> {
        match self.phase {
            Phase::Paused => Ok(()),
            other => Err(precondition(format!("container is {}, not paused", other.name()))),
        }
    }

    /// It runs now.
    pub fn started(&mut self) {
        self.change(Phase::Created, Phase::Running);
    }

    /// It is frozen now.
    pub fn paused(&mut self) {
        self.change(Phase::Running, Phase::Paused);
    }

    /// It runs again.
    pub fn resumed(&mut self) {
        self.change(Phase::Paused, Phase::Running);
    }

    fn change(&mut self, from: Phase, to: Phase) {
        if self.phase == from {
            self.phase = to;
        }
    }

    /// It has ended. True when that is news.
    pub fn exited(&mut self, exit: Exit) -> bool {
        if !self.is_live() {
            return false;
        }
        self.phase = Phase::Stopped(exit);
        self.exit.send_replace(Some(exit));
        true
    }
}

fn precondition(text: impl Into<String>) -> TaskError {
    TaskError::FailedPrecondition(text.into())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Start,
        Pause,
        Resume,
        Exit(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Start),
            Just(Step::Pause),
            Just(Step::Resume),
            (0u32..256).prop_map(Step::Exit)
        ]
    }

    /// As the driver does it: a change only after its check.
    fn apply(process: &mut Process, step: Step) -> bool {
        match step {
            Step::Start if process.check_start().is_ok() => process.started(),
            Step::Pause if process.check_running().is_ok() => process.paused(),
            Step::Resume if process.check_paused().is_ok() => process.resumed(),
            Step::Exit(status) => {
                return process.exited(Exit { status, at: UNIX_EPOCH + Duration::from_secs(status.into()) });
            }
            _ => {}
        }
        false
    }

    proptest! {
        #[test]
        fn the_first_exit_is_the_only_one(steps in proptest::collection::vec(step(), 0..40)) {
            let mut process = Process::default();
            let waiter = process.exit();
            let first = steps.iter().find_map(|step| match step { Step::Exit(status) => Some(*status), _ => None });
            let news = steps.iter().filter(|step| apply(&mut process, **step)).count();
            prop_assert_eq!(news, usize::from(first.is_some()));
            prop_assert_eq!(waiter.borrow().map(|exit| exit.status), first);
            prop_assert_eq!(process.is_live(), first.is_none());
            prop_assert_eq!(process.check_signal().is_err(), first.is_some());
        }

        #[test]
        fn exactly_one_of_the_moves_fits_each_phase(steps in proptest::collection::vec(step(), 0..40)) {
            let mut process = Process::default();
            for step in steps {
                apply(&mut process, step);
                let fits = [process.check_start(), process.check_running(), process.check_paused()];
                prop_assert_eq!(fits.iter().filter(|fit| fit.is_ok()).count(), usize::from(process.is_live()));
                let deletable = matches!(process.phase(), Phase::Created | Phase::Stopped(_));
                prop_assert_eq!(process.check_delete().is_ok(), deletable);
            }
        }
    }

    #[test]
    fn a_finished_process_is_not_found_by_signals() {
        let mut process = Process::default();
        assert!(process.exited(Exit { status: 137, at: UNIX_EPOCH }));
        assert!(matches!(process.check_signal(), Err(TaskError::NotFound(_))));
        assert!(matches!(process.check_start(), Err(TaskError::FailedPrecondition(_))));
    }
}
