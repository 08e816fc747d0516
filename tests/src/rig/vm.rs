//! The host processes of one container's VM.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Rig, proc};

/// Process IDs of one VM.
#[derive(Debug)]
pub struct Vm {
    /// The shim.
    pub shim: u32,
    /// QEMU.
    pub qemu: u32,
    /// The share daemon.
    pub fsd: u32,
}

impl Vm {
    /// The VM of a container, as `vmctr inspect` tells.
    pub fn of(rig: &Rig, id: &str) -> Self {
        let view = rig.inspect(id);
        Self { shim: pid(&view, "shim"), qemu: pid(&view, "qemu"), fsd: pid(&view, "fsd") }
    }

    /// Whether any of its processes runs.
    pub fn is_alive(&self) -> bool {
        [self.shim, self.qemu, self.fsd].into_iter().any(proc::is_alive)
    }
}

/// Sends a signal to a process of the test's own.
pub fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap_or_else(|e| panic!("cannot signal {pid}: {e}"));
}

fn pid(view: &Value, role: &str) -> u32 {
    let processes = view["processes"].as_array().expect("a list of processes");
    let process = processes.iter().find(|process| process["role"] == role);
    let pid =
        process.and_then(|process| process["pid"].as_u64()).unwrap_or_else(|| panic!("no {role}: {view}"));
    u32::try_from(pid).expect("a process ID")
}
