//! The host's side of a helper VM: what it is made of, how it is started, watched and ended.
//!
//! ```text
//!   config ──> spec ──┐
//!   assets ───────────┼──> vm ──> jail ──> qemu          one VM = one driver task + one QEMU process
//!   qemu ── accel ────┘     ├──> vsock                   the guest's vsock device, served in this process
//!   run_dir ────────────────┘    qmp, console, agent     what the driver talks to
//! ```

pub mod accel;
pub mod assets;
pub mod binaries;
pub mod config;
mod console;
mod error_chain;
#[cfg(test)]
mod fake;
mod guest_files;
pub mod jail;
mod lines;
mod log_rate;
mod memory;
pub mod origin;
pub mod pool;
pub mod qemu;
mod qmp;
pub mod run_dir;
mod spawn;
pub mod spec;
pub mod template;
mod tsc;
pub mod vm;
pub mod vsock;

pub use error_chain::error_chain;
pub use log_rate::LogRate;
pub use memory::{MemoryError, MemoryMib};
