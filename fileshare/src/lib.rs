//! File sharing between host and guest.
//!
//! [`share`] serves folders of the host to the guest over virtiofs: the daemon `vmctr-fsd` and the
//! call that starts one. [`export`] serves a folder of the guest to the host: a FUSE mount whose operations the
//! guest carries out.

pub mod export;
mod folder;
#[cfg(feature = "share")]
pub mod share;
mod sys;
