//! The VM's vsock device: a vhost-user back-end on threads of this process, without any kernel module of
//! the host.
//!
//! ```text
//!   users                                    worker thread                                    guest
//!   VsockHost::connect ──> Inbox ──┐
//!   UnixServer (CONNECT) ──────────┴──> Mux ── Connection ── Local <══ socket pair ══> user's stream
//!   VsockHost::listen <── Listeners <──  │         └─ credit, half-closes, resets
//!                                        └── Engine ── rings in guest memory <────────────> driver
//! ```
//!
//! | file | owns |
//! |---|---|
//! | `packet` | the header's layout |
//! | `credit` | the counters of flow control |
//! | `backlog`, `local` | the host's end of a connection |
//! | `connection` | the state machine of one connection |
//! | `mux` | the table of connections: routing, turns, bounds |
//! | `ring`, `engine` | descriptor chains; moving packets between rings and table |
//! | `poller`, `inbox`, `listen` | what wakes the worker, and what users hand over |
//! | `device`, `host`, `unix` | the back-end QEMU talks to, the users' handle, the per-VM socket |
//!
//! Everything up to `mux` knows sockets and packets but no queue, and is tested without a VM.
//!
//! Invariants, against any guest:
//! - memory is bounded: connections by number, bytes per connection by the credit we give, resets by number;
//! - bytes arrive in order or the connection ends; what a guest sent before it closed is delivered;
//! - one connection that stands still (its user does not read, the guest gives no credit) stops no other;
//! - a packet that breaks the protocol costs its own connection, a broken ring all connections of that VM.

mod backlog;
mod connection;
mod credit;
mod device;
mod engine;
mod error;
mod host;
mod inbox;
mod listen;
mod local;
mod mux;
mod packet;
mod poller;
mod ring;
mod unix;

#[cfg(test)]
mod tests;

pub use error::{AcceptError, ConnectError, ListenError, SpawnError};
pub use host::VsockHost;
pub use listen::Listener;
pub use unix::UnixServer;
