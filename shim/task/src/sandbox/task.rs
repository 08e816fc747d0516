//! One process of the container as the driver keeps it: its state, its streams, what its start needs.

use crate::error::{Result, TaskError};
use crate::stdio::{Names, ProcessIo};

use super::process::Process;
use super::request::ExecRequest;

/// A process. The container's init process has an empty exec ID.
#[derive(Debug)]
pub struct Task {
    /// Its state.
    pub process: Process,
    /// containerd's names of its streams.
    pub names: Names,
    /// The running copies; none for a process that was not started or is deleted.
    pub io: Option<ProcessIo>,
    /// The agent knows it: an init process always, an exec from its start on.
    pub in_guest: bool,
    /// In the guest's numbering; 0 before the start.
    pub guest_pid: u32,
    /// OCI `process` object of an exec, for its start.
    pub exec_spec: Option<Vec<u8>>,
    /// Terminal size that was set before the start.
    pub size: Option<(u32, u32)>,
}

impl Task {
    /// The container's init process, which the agent has prepared.
    pub fn init(names: Names, io: ProcessIo) -> Self {
        Self {
            process: Process::default(),
            names,
            io: Some(io),
            in_guest: true,
            guest_pid: 0,
            exec_spec: None,
            size: None,
        }
    }

    /// An exec that nobody but the driver knows yet.
    pub fn exec(request: ExecRequest) -> Self {
        Self {
            process: Process::default(),
            names: request.names,
            io: None,
            in_guest: false,
            guest_pid: 0,
            exec_spec: Some(request.spec),
            size: None,
        }
    }
}

/// An exec's ID as it goes to the guest, into events and log lines.
pub fn check_exec_id(id: &str) -> Result<()> {
    const MAX: usize = 128;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !id.is_empty() && id.len() <= MAX && id.bytes().all(plain) {
        return Ok(());
    }
    Err(TaskError::InvalidArgument(format!(
        "exec ID {id:?} is not 1 to {MAX} letters, digits, dashes, underscores and dots"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_ids_are_plain_names() {
        for good in ["e1", "0a_b-c.d", &"x".repeat(128)] {
            check_exec_id(good).unwrap();
        }
        for bad in ["", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(check_exec_id(bad).is_err(), "{bad}");
        }
    }
}
