//! The states of a process, as a value that cannot skip one.
//!
//! ```text
//!   init  Preparing ──prepared──> Created ──start──> Starting ──started──> Running ──exited──> Exited
//!                                    └──────────────────┴───exited (killed before its program ran)─┘
//!   exec  Registered ──start──> Preparing ──prepared──> Running ──exited──> Exited
//!                                   └──failed──> Failed
//! ```
//!
//! A failed init leaves no container behind, a failed exec waits to be deleted. Exactly one exit is
//! reported for each process that was ever prepared.

use rustix::process::Pid;

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// An exec that was not started.
    Registered,
    /// A helper builds it.
    Preparing,
    /// An init process that waits for its start.
    Created(Pid),
    /// Told to run its program; not yet known to do so.
    Starting(Pid),
    /// Runs its program.
    Running(Pid),
    /// Ended, with its exit code or 128 + signal.
    Exited(u32),
    /// Could not be built.
    Failed,
}

/// The process is in no state for this.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is {}, not {wanted}", state.name())]
pub struct WrongState {
    state: State,
    wanted: &'static str,
}

type Result<T> = std::result::Result<T, WrongState>;

impl State {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Preparing => "being prepared",
            Self::Created(_) => "created",
            Self::Starting(_) => "starting",
            Self::Running(_) => "running",
            Self::Exited(_) => "stopped",
            Self::Failed => "failed",
        }
    }

    /// The live process.
    pub fn pid(self) -> Option<Pid> {
        match self {
            Self::Created(pid) | Self::Starting(pid) | Self::Running(pid) => Some(pid),
            Self::Registered | Self::Preparing | Self::Exited(_) | Self::Failed => None,
        }
    }

    /// The live process, for whoever needs one.
    pub fn live(self) -> Result<Pid> {
        self.pid().ok_or(WrongState { state: self, wanted: "running" })
    }

    /// An exec's helper begins.
    pub fn prepare(&mut self) -> Result<()> {
        self.advance("registered", |state| (state == Self::Registered).then_some(Self::Preparing))
    }

    /// An init process exists and waits.
    pub fn created(&mut self, pid: Pid) -> Result<()> {
        self.advance("being prepared", |state| (state == Self::Preparing).then_some(Self::Created(pid)))
    }

    /// An exec runs its program.
    pub fn running(&mut self, pid: Pid) -> Result<()> {
        self.advance("being prepared", |state| (state == Self::Preparing).then_some(Self::Running(pid)))
    }

    /// An exec could not be built.
    pub fn failed(&mut self) -> Result<()> {
        self.advance("being prepared", |state| (state == Self::Preparing).then_some(Self::Failed))
    }

    /// An init process is told to run its program.
    pub fn start(&mut self) -> Result<Pid> {
        let Self::Created(pid) = *self else {
            return Err(WrongState { state: *self, wanted: "created" });
        };
        *self = Self::Starting(pid);
        Ok(pid)
    }

    /// An init process runs its program; one that has ended already stays so.
    pub fn started(&mut self) {
        if let Self::Starting(pid) = *self {
            *self = Self::Running(pid);
        }
    }

    /// The process ended; true when that was news.
    pub fn exited(&mut self, status: u32) -> bool {
        let alive = self.pid().is_some();
        if alive {
            *self = Self::Exited(status);
        }
        alive
    }

    /// Whether an exec can be forgotten.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Registered | Self::Exited(_) | Self::Failed)
    }

    fn advance(&mut self, wanted: &'static str, next: impl Fn(Self) -> Option<Self>) -> Result<()> {
        *self = next(*self).ok_or(WrongState { state: *self, wanted })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pid() -> Pid {
        Pid::from_raw(7).unwrap()
    }

    #[test]
    fn an_init_goes_through_all_states() {
        let mut state = State::Preparing;
        state.created(pid()).unwrap();
        assert_eq!(state.start().unwrap(), pid());
        state.started();
        assert_eq!(state, State::Running(pid()));
        assert!(state.exited(137));
        assert_eq!(state.start().unwrap_err().to_string(), "it is stopped, not created");
    }

    #[test]
    fn an_init_that_ends_while_it_starts_stays_ended() {
        let mut state = State::Created(pid());
        state.start().unwrap();
        assert!(state.exited(1));
        state.started();
        assert_eq!(state, State::Exited(1));
    }

    proptest! {
        /// Whatever happens in whatever order, a process exits at most once, and only one that existed.
        #[test]
        fn one_exit_per_process(steps in proptest::collection::vec(0..8_u8, 0..40), exec: bool) {
            let mut state = if exec { State::Registered } else { State::Preparing };
            let (mut existed, mut exits) = (false, 0);
            for step in steps {
                match step {
                    0 => drop(state.prepare()),
                    1 => existed |= state.created(pid()).is_ok(),
                    2 => existed |= state.running(pid()).is_ok(),
                    3 => drop(state.failed()),
                    4 => drop(state.start()),
                    5 => state.started(),
                    _ => exits += u32::from(state.exited(0)),
                }
                prop_assert!(exits <= u32::from(existed));
                prop_assert_eq!(state.pid().is_some(), existed && exits == 0);
            }
        }
    }
}
