//! The export: a folder of the guest, mounted on the host.
//!
//! ```text
//!   process ─ VFS ─ fuse.vmctr ─ /dev/fuse ─┬─ relay thread ══ stream ══ thread ─┬─ merged folder
//!   (host)                                  ├─ relay thread ══ stream ══ thread ─┤  (guest)
//!                                           └─ ...          waits ══════ thread ─┘
//!                                  host: checks each answer        guest: does each request
//! ```
//!
//! [`wire`] is what crosses, [`guest`] the server, [`host`] the mount and the relay. The host decides what may be
//! remembered and for how long, and believes no answer before it has looked at it.

mod bytes;
pub mod guest;
pub mod host;
mod privileges;
mod stat;
mod sys;
pub mod wire;
