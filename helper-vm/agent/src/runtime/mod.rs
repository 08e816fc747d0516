//! The `runtime` subcommand: a short-lived process that builds a container or an exec with libcontainer.
//!
//! ```text
//!   PID 1 ── spawns ──> vmctr-agent runtime create cN REPORT_FD
//!     │                   mounts the root, forks the init process, then ends
//!     │                   └─ init (child of PID 1 from then on) waits on state/cN/notify.sock
//!     │<── report pipe ── "log ...", "pid 17", or "error ..."; end of file once init has executed
//! ```
//!
//! libcontainer forks and works in the forks, which a process with threads must not do. The process's own
//! standard streams are those of the container's process.

mod create;
mod exec;
mod log;
mod mount_points;
mod null;
mod payload;
pub mod report;
mod seccomp;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use report::Reporter;

use crate::boot::limits;

/// First argument of the subcommand.
pub const SUBCOMMAND: &str = "runtime";
/// Second argument: build a container.
pub const CREATE: &str = "create";
/// Second argument: run a further process.
pub const EXEC: &str = "exec";

/// Where containers' directories are: bundle, root, console sockets.
pub const CONTAINERS_DIR: &str = "/run/vmctr/containers";
/// Where libcontainer keeps its state.
pub const STATE_DIR: &str = "/run/vmctr/state";
/// The root's description in a container's directory: `vmctr.agent.v1.Root`, encoded.
pub const ROOT_FILE: &str = "root.bin";

/// The directory of the container with this short name.
pub fn container_dir(name: &str) -> PathBuf {
    Path::new(CONTAINERS_DIR).join(name)
}

/// The runtime spec's `process` object of an exec, in the container's directory.
pub fn process_file(name: &str, exec: &str) -> PathBuf {
    container_dir(name).join(format!("{exec}.json"))
}

/// Where the pseudo-terminal's master of a process is sent to.
pub fn console_socket(name: &str, process: &str) -> PathBuf {
    container_dir(name).join(format!("{process}.tty"))
}

/// What the subcommand was asked for.
struct Job {
    verb: String,
    /// Short name of the container.
    container: String,
    /// Short name of the process; `init` for the container's own.
    process: String,
    terminal: bool,
    report: RawFd,
}

/// Runs the subcommand.
pub fn main(args: impl Iterator<Item = String>) -> ExitCode {
    let Some(job) = Job::parse(args) else {
        return ExitCode::from(125);
    };
    let Some(reporter) = Reporter::inherit(job.report) else {
        return ExitCode::from(125);
    };
    log::forward_to(reporter);
    // PID 1 may have a higher limit, for exports.
    if let Err(error) = limits::limit_open_files() {
        reporter.error(&format!("limiting open files: {error}"));
        return ExitCode::FAILURE;
    }
    // The standard error is the container's.
    std::panic::set_hook(Box::new(move |panic| reporter.error(&panic.to_string())));
    let outcome = match job.verb.as_str() {
        CREATE => create::create(&job, reporter),
        EXEC => exec::exec(&job, reporter),
        other => Err(anyhow::anyhow!("unknown runtime verb {other:?}")),
    };
    match outcome {
        Ok(pid) => reporter.pid(pid),
        Err(error) => {
            reporter.error(&format!("{error:#}"));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

impl Job {
    fn parse(mut args: impl Iterator<Item = String>) -> Option<Self> {
        Some(Self {
            verb: args.next()?,
            container: args.next()?,
            process: args.next()?,
            terminal: args.next()? == "terminal",
            report: args.next()?.parse().ok()?,
        })
    }
}

/// The helper inherits PID 1's protection from the OOM killer; containers' processes must not.
fn leave_agents_protection() -> std::io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "0")
}
