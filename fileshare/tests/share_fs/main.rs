//! The served file system, asked directly: what a hostile guest kernel could send. Needs root, no VM.
//!
//! Each test builds a real share root in a mount namespace of its own thread and pivots into it, as the daemon
//! does, so that the host's mount flags are part of what is tested.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used)]

mod cache;
mod hostile;
mod layout;
mod overlay;
mod rig;
