//! Kernel settings: what protects PID 1, and what a container may ask for that the defaults forbid.

use std::fs;
use std::io;

/// (file below /proc, value)
const SETTINGS: [(&str, &str); 3] = [
    // The OOM killer never takes PID 1; helpers set their own before a container's process exists.
    ("self/oom_score_adj", "-1000"),
    // Process numbers are not soon used again.
    ("sys/kernel/pid_max", "4194304"),
    // containerd and others ask for a hard limit of 2^20 open files or more.
    ("sys/fs/nr_open", "1073741816"),
];

/// Writes the settings.
pub fn set_up() -> io::Result<()> {
    for (file, value) in SETTINGS {
        let path = format!("/proc/{file}");
        fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
    }
    Ok(())
}
