//! The log: short lines on the console, which the host forwards to containerd's log.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

use rustix::stdio;

const CONSOLE: &str = "/dev/console";

static LOG: OnceLock<File> = OnceLock::new();

/// Opens the console for the log and points PID 1's own standard streams at /dev/null, so that nothing
/// that a library prints can block on it.
pub fn attach() -> std::io::Result<()> {
    let console = File::options().write(true).open(CONSOLE)?;
    let _ = LOG.set(console);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    stdio::dup2_stdin(&null)?;
    stdio::dup2_stdout(&null)?;
    stdio::dup2_stderr(&null)?;
    Ok(())
}

/// Panics go to the log as well: the standard error is /dev/null.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| error(&panic.to_string())));
}

/// Something that an operator wants to see.
pub fn info(message: &str) {
    line("info", message);
}

/// Something that failed without ending a request.
pub fn warn(message: &str) {
    line("warn", message);
}

/// Something that ended the agent or a request.
pub fn error(message: &str) {
    line("error", message);
}

fn line(level: &str, message: &str) {
    let text = format!("vmctr-agent {level}: {}\n", message.replace('\n', " "));
    match LOG.get() {
        Some(mut console) => {
            // Nowhere is left to complain when the console itself fails.
            let _ = console.write_all(text.as_bytes());
        }
        None => eprint!("{text}"),
    }
}
