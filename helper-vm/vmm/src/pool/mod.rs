//! The pool of VMs that wait: what its processes say to each other.
//!
//! ```text
//!   containerd-shim start ── Ask::Take + bundle, pipe ──> vmctr pool run ── Order + bundle, pipe ──> member
//!                         <──────────── Answer ─────────┘   (pool.sock)                              (its stdin)
//!   vmctr pool ls ────────── Ask::List ─────────────────>        <────────────── Ready ──────────────┘
//! ```
//!
//! A member is a shim that has no container yet, with a VM that was restored, has run a rehearsal and is paused.
//! When it gets its order it becomes that container's shim, and the pool forgets it. A member whose pool has gone
//! ends itself and its VM, so the pool may stop or crash at any time; a pool that does not answer costs the shim's
//! start nothing but the advantage.

pub mod wire;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::memory::MemoryMib;

/// The command that makes the shim's program a member; its standard input is the pool's socket.
pub const MEMBER_ACTION: &str = "warm";

/// The program that is a member.
pub const MEMBER_PROGRAM: &str = "containerd-shim-vmctr-v2";

/// What a client of the pool wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// A VM for this container. Two descriptors come along: the bundle, and the pipe that `start` reads.
    Take(Order),
    /// Who waits.
    List,
}

/// What the pool says to that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// The member with this process ID has the order.
    Taken(u32),
    /// No member waits.
    Empty,
    /// The pool cannot serve this client.
    Refused(String),
    /// In order of their start.
    List(Vec<Member>),
}

/// How a shim's server is to run: what is on its command line otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// See [`config_digest`].
    pub config: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's socket.
    pub address: String,
    /// The shim's socket.
    pub socket: String,
    /// containerd's socket for events.
    pub ttrpc_address: String,
    /// Whether to log more.
    pub debug: bool,
}

/// What a member says when its VM waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    /// QEMU's process ID.
    pub qemu: u32,
}

/// A member as `vmctr pool ls` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its process ID.
    pub pid: u32,
    /// QEMU's, once its VM waits.
    pub qemu: Option<u32>,
    /// Since its start.
    pub age_seconds: u64,
}

/// Where the pool listens.
#[must_use]
pub fn socket(config: &Config) -> PathBuf {
    config.run_dir.join("pool.sock")
}

/// How many members there are to be: as many as configured, as far as the memory that they may take allows.
#[must_use]
pub fn size(config: &Config) -> usize {
    let fits = config.pool.memory.mib() / config.vm.memory.mib().max(1);
    usize::try_from(config.pool.size.min(fits)).unwrap_or(usize::MAX)
}

/// A shim takes no VM from a pool of another version or with another configuration.
#[must_use]
pub fn config_digest(config: &Config) -> String {
    Sha256::digest(format!("{} {config:?}", env!("CARGO_PKG_VERSION")))
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The most memory that waiting VMs take unless the configuration says otherwise.
pub(crate) const DEFAULT_MEMORY: MemoryMib = MemoryMib::new(2048);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PoolConfig;

    #[test]
    fn the_pool_is_bounded_by_number_and_memory_and_off_by_default() {
        assert_eq!(size(&Config::default()), 0);
        let config = |size, memory| {
            let pool = PoolConfig { size, memory: MemoryMib::new(memory) };
            Config { pool, ..Config::default() }
        };
        assert_eq!(size(&config(3, 4096)), 3);
        assert_eq!(size(&config(30, 1100)), 2);
        assert_eq!(size(&config(3, 100)), 0);
    }

    #[test]
    fn another_configuration_has_another_digest() {
        let other = Config { run_dir: "/x".into(), ..Config::default() };
        assert_eq!(config_digest(&Config::default()), config_digest(&Config::default()));
        assert_ne!(config_digest(&other), config_digest(&Config::default()));
    }
}
