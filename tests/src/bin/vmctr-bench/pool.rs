//! VMs that wait for containers, for as long as this is measured.

use std::process::Stdio;

use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::{Running, TIME_LIMIT, eventually, run};

/// `vmctr pool run`; dropping it kills it, and with it the VMs that wait.
pub struct Pool<'rig> {
    rig: &'rig Rig,
    _keeper: Running,
}

impl<'rig> Pool<'rig> {
    /// Begins to keep VMs.
    pub fn start(rig: &'rig Rig) -> Self {
        let keeper = Running::start(rig.vmctr_command().args(["pool", "run"]).stdin(Stdio::null()));
        Self { rig, _keeper: keeper }
    }

    /// A container that starts now finds a VM.
    pub fn wait_until_filled(&self) {
        eventually("a VM waits", TIME_LIMIT, || {
            let list = run(self.rig.vmctr_command().args(["pool", "ls", "--json"]));
            list.code() == 0
                && list
                    .json()
                    .as_array()
                    .is_some_and(|members| members.iter().any(|member| !member["qemu"].is_null()))
        });
    }
}
