//! Confines itself as its only argument says, and becomes the program named there: see `vmctr_vmm::jail`.
//!
//! Started by the shim and by the CLI, never by hand. When it fails, it prints one line with the cause and
//! exits with [`EXIT_STATUS`].

use std::error::Error;
use std::process::exit;

use vmctr_vmm::error_chain;
use vmctr_vmm::jail::enter::enter;
use vmctr_vmm::jail::{EXIT_STATUS, JailSpec};

fn main() {
    let Err(error) = run();
    eprintln!("vmctr-jail: {}", error_chain(&*error));
    exit(EXIT_STATUS);
}

fn run() -> Result<std::convert::Infallible, Box<dyn Error>> {
    let argument = std::env::args().nth(1).ok_or("no jail described; vmctr starts this program by itself")?;
    let spec: JailSpec = serde_json::from_str(&argument)?;
    Ok(enter(&spec)?)
}
