//! The share daemon. Started by the shim, with its control socket as stdin; see `vmctr_fileshare::share`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;
use vmctr_fileshare::share::daemon;

/// Exit status of a panic, as the standard library has it.
const PANIC: i32 = 101;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--version") {
        return print_version();
    }
    start_log();
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8> {
    let control = daemon::take_control()?;
    let status = daemon::run(control).context("share daemon")?;
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}

fn print_version() -> ExitCode {
    let version = env!("CARGO_PKG_VERSION");
    match writeln!(std::io::stdout(), "vmctr-fsd {version}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// One line per event on stderr, which the shim reads; it adds the time and the container. Records of the `log`
/// crate, which virtiofsd writes, are among them.
fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_ansi(false)
        .init();
    end_on_panic();
}

/// A panic in one thread would leave the guest waiting for ever: end the process, so that QEMU and the shim see
/// it.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}");
        std::process::exit(PANIC);
    }));
}
