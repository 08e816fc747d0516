//! Kernel settings: what protects PID 1, what makes it quick, what containers may ask for.

use std::fs;
use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};

/// (file, value)
const SETTINGS: [(&str, &str); 4] = [
    // Mounting, unmounting and moving between groups wait for RCU, which here is most of their time.
    ("/sys/kernel/rcu_expedited", "1"),
    // The OOM killer never takes PID 1; helpers set their own before a container's process exists.
    ("/proc/self/oom_score_adj", "-1000"),
    // Process numbers are not soon used again.
    ("/proc/sys/kernel/pid_max", "4194304"),
    // containerd and others ask for a hard limit of 2^20 open files or more.
    ("/proc/sys/fs/nr_open", "1073741816"),
];

/// Open files of PID 1: each process with streams takes six. Containers without a limit of their own have
/// the same.
const OPEN_FILES: u64 = 1 << 16;

/// Limits the caller's open files to what containers have that ask for nothing else.
pub fn limit_open_files() -> io::Result<()> {
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) })?)
}

/// Writes the settings.
pub fn set_up() -> io::Result<()> {
    limit_open_files()?;
    for (file, value) in SETTINGS {
        fs::write(file, value).map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))?;
    }
    Ok(())
}
