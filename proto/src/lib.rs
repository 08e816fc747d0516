//! What host and guest, CLI and shim say to each other: messages, ports, guest paths, protocol version.
//!
//! ```text
//!   vmctr ──control.proto (unix socket)──> shim ──agent.proto (vsock AGENT)──> agent
//!                                          shim <──one connect (vsock READY)── agent, when it serves
//!                                          shim ──raw bytes (vsock STDIO)────> agent, one per stream
//! ```

mod cid;
pub mod guest_paths;
pub mod manifest;
pub mod ports;
pub mod union_ports;

pub use cid::{CidError, GuestCid};

/// Messages and service of `agent.proto`.
#[allow(missing_docs, clippy::all)]
pub mod agent {
    tonic::include_proto!("vmctr.agent.v1");
}

/// Messages and service of `control.proto`.
#[allow(missing_docs, clippy::all)]
pub mod control {
    tonic::include_proto!("vmctr.control.v1");
}

/// Version of `agent.proto` and of the stdio stream header. A change that an older peer would
/// misread raises it.
pub const PROTOCOL_VERSION: u32 = 2;

/// Oldest version that this build still speaks: an older agent ignores the seed in `Hello`.
pub const PROTOCOL_VERSION_MIN: u32 = 2;

/// Length of `HelloRequest.random_seed`: the state of the kernel's generator.
pub const SEED_BYTES: usize = 32;

/// What the agent's console line ends with when all is prepared and only the vsock device is missing: there
/// a template is taken. The agent then looks for the device until it is there.
pub const TEMPLATE_POINT: &str = "waits for its devices";

/// The version that two peers use: the highest that both speak, or `None` when the ranges do not meet.
#[must_use]
pub fn negotiate(peer_min: u32, peer_max: u32) -> Option<u32> {
    let highest = peer_max.min(PROTOCOL_VERSION);
    (highest >= peer_min.max(PROTOCOL_VERSION_MIN)).then_some(highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_wins() {
        assert_eq!(negotiate(PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MIN), Some(PROTOCOL_VERSION_MIN));
        assert_eq!(negotiate(1, 9), Some(PROTOCOL_VERSION));
        assert_eq!(negotiate(PROTOCOL_VERSION + 1, 9), None);
        assert_eq!(negotiate(0, 0), None);
    }
}
