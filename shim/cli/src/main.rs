//! `vmctr`: looks at the VMs that containers run in, turns their changes into images, checks the host,
//! builds the guest.
//!
//! ```text
//!   cli.rs       the command line as data
//!   commands/    one module per verb ──> control.rs (shim's socket), containerd.rs, vms.rs (run directories)
//!   container.rs a container as containerd records it
//!   source/      where a container's changes are, held still while they are read
//!   failure.rs   exit codes, messages, hints
//!   output.rs    tables and JSON
//! ```
//!
//! Called as `mount.fuse.vmctr` it is the helper of mount(8) for unions.
//!
//! A verb prints its answer to stdout and returns a verdict; an error becomes one line on stderr.

mod cli;
mod commands;
mod container;
mod containerd;
mod control;
mod failure;
mod output;
mod progress;
mod scratch;
mod source;
mod sys;
mod vms;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::cli::Cli;
use crate::failure::Exit;

/// Under this name mount(8) calls the program.
const MOUNT_HELPER: &str = "mount.fuse.vmctr";

/// How long threads have to put away what they hold after an interruption.
const GRACE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().map(PathBuf::from);
    if name.as_deref().and_then(Path::file_name).is_some_and(|name| name == MOUNT_HELPER) {
        return finish(commands::mount_helper(args), Exit::for_mount);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => return not_parsed(&answer),
    };
    log_to_stderr();
    finish(block_on(commands::run(cli)), ExitCode::from)
}

fn finish(outcome: failure::Outcome, code: fn(Exit) -> ExitCode) -> ExitCode {
    match outcome {
        Ok(verdict) => verdict.into(),
        Err(failure) => {
            eprintln!("{failure}");
            code(failure.exit())
        }
    }
}

/// Help and version are answers; anything else is wrong usage.
fn not_parsed(answer: &clap::Error) -> ExitCode {
    // Nothing is left to say if the terminal is gone.
    let _ = answer.print();
    if answer.use_stderr() { Exit::Failed.into() } else { ExitCode::SUCCESS }
}

/// `RUST_LOG` turns the libraries' log on; what a verb has to say is never said there.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("off"));
    let colour = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
}

fn block_on(work: impl Future<Output = failure::Outcome>) -> failure::Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(work);
    if outcome.as_ref().is_err_and(|failure| failure.exit() == Exit::Interrupted) {
        // A thread in the middle of something large does not hold up whoever interrupted it.
        runtime.shutdown_timeout(GRACE);
    }
    outcome
}
