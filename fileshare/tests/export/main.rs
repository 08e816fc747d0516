//! The export without a VM: server and relay joined by socket pairs, under a real FUSE mount.
//!
//! What is served is a plain folder, or an overlay that the test mounts in a mount namespace of its own (only
//! tests do that: there it stands for the guest's). Needs root.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used)]

mod apart;
mod basics;
mod claims;
mod corpus;
mod differential;
mod evict;
mod hostile;
mod lending;
mod lent;
mod lock;
mod others;
mod overlay;
mod place;
mod random_io;
mod rig;
mod served;
mod shortcut;
mod steps;
mod sys;
mod users;
mod victim;
