//! File sharing between host and guest.
//!
//! [`share`] serves folders of the host to the guest over virtiofs: the daemon `vmctr-fsd` and the
//! call that starts one.

pub mod share;
