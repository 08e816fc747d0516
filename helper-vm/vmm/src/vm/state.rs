//! The states of a VM and which may follow which. Pure; the driver task is the only one that moves.

use std::fmt;

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Described, nothing started.
    Spec,
    /// QEMU runs, the guest boots.
    Starting,
    /// The agent has said that it serves.
    Ready,
    /// The agent answered Hello; the VM is in use.
    Running,
    /// The guest's CPUs are stopped.
    Paused,
    /// Stopped on request; nothing is left.
    Stopped,
    /// Ended by itself, with the reason; nothing is left.
    Failed(String),
}

/// A move that the VM's life does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The VM is {from}, so it cannot become {to}")]
pub struct InvalidMove {
    /// Where it is.
    pub from: VmState,
    /// Where it should go.
    pub to: VmState,
}

impl VmState {
    /// Whether the VM is over.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Stopped | Self::Failed(_))
    }

    /// Whether the VM has a guest that can be talked to or resumed.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }

    /// The next state, if the move exists.
    pub(super) fn to(&self, next: Self) -> Result<Self, InvalidMove> {
        use VmState::{Failed, Paused, Ready, Running, Spec, Starting, Stopped};
        let allowed = match (self, &next) {
            (Spec, Starting) | (Starting, Ready) | (Ready | Paused, Running) | (Running, Paused) => true,
            (from, Stopped | Failed(_)) => !from.is_final(),
            _ => false,
        };
        if allowed { Ok(next) } else { Err(InvalidMove { from: self.clone(), to: next }) }
    }
}

/// The state's name, without a failure's reason.
impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Spec => "Spec",
            Self::Starting => "Starting",
            Self::Ready => "Ready",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Stopped => "Stopped",
            Self::Failed(_) => "Failed",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_state() -> impl Strategy<Value = VmState> {
        prop_oneof![
            Just(VmState::Spec),
            Just(VmState::Starting),
            Just(VmState::Ready),
            Just(VmState::Running),
            Just(VmState::Paused),
            Just(VmState::Stopped),
            Just(VmState::Failed("reason".into())),
        ]
    }

    #[test]
    fn the_way_through_life_exists() {
        let way = [
            VmState::Starting,
            VmState::Ready,
            VmState::Running,
            VmState::Paused,
            VmState::Running,
            VmState::Stopped,
        ];
        way.into_iter().try_fold(VmState::Spec, |state, next| state.to(next)).unwrap();
    }

    #[test]
    fn nothing_is_usable_before_the_agent_answered() {
        assert!(VmState::Spec.to(VmState::Running).is_err());
        assert!(VmState::Starting.to(VmState::Running).is_err());
        assert!(VmState::Ready.to(VmState::Paused).is_err());
    }

    proptest! {
        #[test]
        fn the_end_is_final_and_always_in_reach(from in any_state(), to in any_state()) {
            prop_assert!(!from.is_final() || from.to(to.clone()).is_err());
            prop_assert_eq!(from.to(VmState::Stopped).is_ok(), !from.is_final());
            if from.to(to.clone()).is_ok() {
                prop_assert_ne!(from, to);
            }
        }
    }
}
