//! What can go wrong with a VM, each with the phase and the cause.

use std::fmt;
use std::io;
use std::time::Duration;

use super::state::{InvalidMove, VmState};
use crate::binaries::BinaryError;
use crate::qmp::QmpError;
use crate::run_dir::RunDirError;
use crate::template::TemplateError;

/// The parts of a start, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// QEMU starts in its jail and sets up its devices.
    Spawn,
    /// The guest boots until its agent says that it serves, or waits for its devices.
    Boot,
    /// A template's memory is copied.
    Copy,
    /// QEMU reads a template's state.
    Restore,
    /// The restored guest finds its devices, and its agent says that it serves.
    Resume,
    /// QEMU writes a template's state.
    Save,
    /// The agent answers the first call.
    Hello,
}

impl Phase {
    /// "spawn", "boot", ...
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spawn => "spawn",
            Self::Boot => "boot",
            Self::Copy => "copy",
            Self::Restore => "restore",
            Self::Resume => "resume",
            Self::Save => "save",
            Self::Hello => "hello",
        }
    }

    fn waits_for(self) -> &'static str {
        match self {
            Self::Spawn => "QEMU to start",
            Self::Boot => "the guest to boot",
            Self::Copy => "the copy of the template's memory",
            Self::Restore => "QEMU to restore the template",
            Self::Resume => "the restored guest to find its devices",
            Self::Save => "QEMU to save the template",
            Self::Hello => "the guest's agent to answer",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A VM did not start, or does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `vmctr-jail` is missing.
    #[error("Cannot start QEMU")]
    Binary(#[from] BinaryError),
    /// Something on the host that a VM needs cannot be made.
    #[error("Cannot {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The run directory cannot be used.
    #[error("Cannot record the VM")]
    RunDir(#[from] RunDirError),
    /// The jail could not be set up.
    #[error("Cannot confine QEMU: {0}")]
    Jail(String),
    /// QEMU ended.
    #[error("{0}")]
    Ended(End),
    /// A phase took too long.
    #[error("Waited {} s in vain for {}{}", limit.as_secs(), phase.waits_for(), said(last_words.as_deref()))]
    TimeLimit {
        /// The phase that did not end.
        phase: Phase,
        /// From QEMU's start.
        limit: Duration,
        /// The console's end.
        last_words: Option<String>,
    },
    /// A VM that goes on does not know how late it is.
    #[error("The guest did not set its clock within {} s", .0.as_secs())]
    Clock(Duration),
    /// The template cannot be used.
    #[error("Cannot restore the VM")]
    Template(#[source] Box<TemplateError>),
    /// QEMU's monitor.
    #[error("Cannot control QEMU")]
    Qmp(#[from] QmpError),
    /// The connection to the agent cannot be made.
    #[error("Cannot connect to the guest's agent")]
    Connect(#[source] tonic::transport::Error),
    /// The agent refused the first call.
    #[error("The guest's agent refused to start")]
    Hello(#[source] Box<tonic::Status>),
    /// The agent chose a protocol version that was not offered.
    #[error("The guest's agent speaks protocol version {0}, this build speaks {min} to {max}: build the guest assets again with `vmctr guest build`", min = vmctr_proto::PROTOCOL_VERSION_MIN, max = vmctr_proto::PROTOCOL_VERSION)]
    Protocol(u32),
    /// The state does not allow it.
    #[error(transparent)]
    Move(#[from] InvalidMove),
    /// The start was given up because nobody waits for it any more.
    #[error("The start of the VM was given up")]
    GivenUp,
    /// The driver task is gone: its runtime shuts down.
    #[error("The VM's driver is gone")]
    DriverGone,
}

impl VmError {
    /// Whether QEMU was never started, so that the error says nothing about it or its guest.
    #[must_use]
    pub(crate) fn is_the_hosts(&self) -> bool {
        matches!(self, Self::Binary(_) | Self::Host { .. } | Self::RunDir(_) | Self::Jail(_))
    }
}

/// How QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The state it ended in.
    pub state: VmState,
    /// Exit status or signal, in words.
    pub status: String,
    /// QEMU's reason for a shutdown, such as `guest-reset`.
    pub shutdown: Option<String>,
    /// QEMU's last lines.
    pub qemu: Option<String>,
    /// The guest console's last lines.
    pub guest: Option<String>,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shutdown.as_deref() {
            Some("guest-reset" | "guest-panic" | "guest-shutdown") => f.write_str("The guest ended")?,
            _ => f.write_str("QEMU ended")?,
        }
        let when = if self.state.is_usable() { "while the VM was in use" } else { "before the VM was ready" };
        write!(f, " {when} ({})", self.status)?;
        if let Some(qemu) = &self.qemu {
            write!(f, "; QEMU last said: {qemu}")?;
        }
        f.write_str(&said(self.guest.as_deref()))
    }
}

fn said(last_words: Option<&str>) -> String {
    last_words.map_or(String::new(), |words| format!("; the guest last said: {words}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(state: VmState, shutdown: Option<&str>, guest: Option<&str>) -> String {
        let (shutdown, guest) = (shutdown.map(str::to_owned), guest.map(str::to_owned));
        End { state, status: "exit status: 0".into(), shutdown, qemu: None, guest }.to_string()
    }

    #[test]
    fn an_end_says_who_ended_and_when() {
        assert_eq!(
            end(VmState::Running, Some("guest-reset"), Some("Kernel panic - not syncing: x")),
            "The guest ended while the VM was in use (exit status: 0); the guest last said: Kernel panic - not \
             syncing: x"
        );
        assert_eq!(end(VmState::Starting, None, None), "QEMU ended before the VM was ready (exit status: 0)");
    }

    #[test]
    fn a_time_limit_names_what_was_waited_for() {
        let error =
            VmError::TimeLimit { phase: Phase::Boot, limit: Duration::from_secs(60), last_words: None };
        assert_eq!(error.to_string(), "Waited 60 s in vain for the guest to boot");
    }
}
