//! `containerd-shim-vmctr-v2`: containerd's way to a container in a VM of its own.
//!
//! ```text
//!   launch    how containerd runs this program: start, server, delete, -info
//!   service   the task API on ttrpc        control   what the CLI asks
//!   sandbox   the driver, which owns the container, and all it is made of
//!   oci, annotations                       what was asked for, checked
//!   stdio, events, stats, log, hooks       what goes back and out
//! ```

mod annotations;
mod control;
mod error;
mod events;
mod hooks;
mod launch;
mod log;
mod oci;
mod sandbox;
mod service;
mod stats;
mod stdio;
mod sys;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use containerd_shim::{Flags, parse};
use tokio::runtime::{Builder, Runtime};
use vmctr_vmm::pool::MEMBER_ACTION;

/// The driver, its calls and the services wait much and compute little.
const WORKERS: usize = 2;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-vmctr-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    let flags = parse(&args).context("read the arguments")?;
    if flags.version {
        return launch::info::print_version();
    }
    if flags.info {
        return launch::info::print_info();
    }
    match flags.action.as_str() {
        "start" => launch::start::run(&flags),
        "delete" => runtime()?.block_on(launch::delete::run(&flags)),
        MEMBER_ACTION => wait_in_pool(),
        "" => serve(&flags),
        other => bail!("unknown action {other:?}; known are start and delete"),
    }
}

fn serve(flags: &Flags) -> Result<()> {
    if flags.socket.is_empty() || flags.id.is_empty() || flags.namespace.is_empty() {
        bail!(
            "this program is run by containerd: see https://github.com/containerd/containerd/blob/main/core/runtime/v2/README.md"
        );
    }
    let address = env::var(launch::TTRPC_ADDRESS).context(launch::TTRPC_ADDRESS)?;
    let runtime = runtime()?;
    let served = runtime.block_on(launch::server::run(flags, &address, None));
    // Threads that still wait for a FIFO end with the process.
    runtime.shutdown_background();
    served
}

fn wait_in_pool() -> Result<()> {
    let runtime = runtime()?;
    let served = runtime.block_on(launch::member::run());
    runtime.shutdown_background();
    served
}

fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build().context("start the runtime")
}
