//! Standard streams of processes: raw bytes between the host and a pipe or pseudo-terminal.
//!
//! ```text
//!   host ── vsock STDIO ──> accept: 8-byte number ──> Streams: pairs numbers with waiting processes
//!                                                        │
//!   process <── pipe or pty ── copying thread ── stream ─┘     one thread per stream
//! ```
//!
//! Processes get pipes, not sockets, so that /dev/stdout can be opened again. Back-pressure is the
//! kernel's: a thread that cannot write does not read.

pub mod accept;
pub mod console;
mod copy;
mod pairing;
pub mod process;

pub use pairing::{Claim, Error, Numbers, Streams};
