//! The processes that own a VM for unions, as others see them: found by their run directories, given orders by their
//! sockets.
//!
//! ```text
//!   RUN_DIR/unions.lock     whoever looks for a VM for a union, or starts one, holds it until that has its word
//!   RUN_DIR/KEY/            KEY from the owner's process ID
//!     meta.json             the owner, the VM
//!     unions.sock           takes orders; a VM that is for one union only has none
//!     log                   what the owner has to say; each union's `log` is the same file
//! ```
//!
//! Invariant: only who has the same user, the same root folder and the same mounts is given an order, so that a path
//! means the same to both.

use std::fs::{self, File};
use std::io::{self, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use vmctr_vmm::config::Config;
use vmctr_vmm::error_chain;
use vmctr_vmm::run_dir::{self, Entry, Owner, RunDirError};

use super::order::{Answer, Order};

/// Stands where containers have containerd's namespace.
const NAMESPACE: &str = "vmctr-union-vm";

const SOCKET: &str = "unions.sock";
const LOCK: &str = "unions.lock";

/// Whoever has the turn may start a VM twice, from a template and then by booting, and some others may come before.
const TURN_LIMIT: Duration = Duration::from_secs(600);

/// An owner says at once whether it takes an order.
const WORD_LIMIT: Duration = Duration::from_secs(10);

/// Who owns the run directory of this process's VM.
pub fn this(config: &Config) -> Owner {
    Owner {
        namespace: NAMESPACE.to_owned(),
        container_id: format!("user-{}", geteuid().as_raw()),
        bundle: config.run_dir.join(format!("unions-{}", std::process::id())),
    }
}

/// Where the owner with this run directory takes orders.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join(SOCKET)
}

/// The right to look for a VM and to start one. Blocks while somebody else has it.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "held for its lock")] File);

impl Turn {
    /// Waits for it.
    pub fn take(config: &Config) -> anyhow::Result<Self> {
        let path = config.run_dir.join(LOCK);
        let locked = run_dir::make_dir(&config.run_dir).and_then(|()| run_dir::lock(&path, TURN_LIMIT));
        locked.map(Self).with_context(|| format!("Cannot lock {}", path.display()))
    }
}

/// Offers the order to each owner in turn; the connection to the one that took it.
pub fn hand_over(config: &Config, order: &Order) -> anyhow::Result<Option<BufReader<UnixStream>>> {
    let order = serde_json::to_vec(order)?;
    for entry in all(config).filter(is_like_us) {
        match offer(&entry, &order) {
            Ok(Some(taken)) => return Ok(Some(taken)),
            Ok(None) => {}
            // It may have ended in this moment. Who is right will have a VM of its own.
            Err(error) => tracing::info!("{} takes no orders: {error:#}", entry.path.display()),
        }
    }
    Ok(None)
}

/// Removes what owners have left that were killed. What cannot be removed is told, and is in nobody's way.
pub fn clear_up(config: &Config) {
    for entry in all(config) {
        match run_dir::clear_dead(&config.run_dir, &entry.key) {
            Ok(()) | Err(RunDirError::InUse { .. }) => {}
            Err(error) => eprintln!("vmctr: {}", error_chain(&error)),
        }
    }
}

fn all(config: &Config) -> impl Iterator<Item = Entry> + use<> {
    let entries = run_dir::list(&config.run_dir).unwrap_or_default().into_iter();
    entries.filter(|entry| entry.meta.owner.namespace == NAMESPACE)
}

fn is_like_us(entry: &Entry) -> bool {
    let same = |pid: u32| {
        let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
        let root = |pid: &str| fs::metadata(format!("/proc/{pid}/root")).map(|root| (root.dev(), root.ino()));
        let pid = pid.to_string();
        io::Result::Ok(mounts(&pid)? == mounts("self")? && root(&pid)? == root("self")?)
    };
    entry.meta.live_shim().is_some_and(|pid| same(pid).unwrap_or(false))
}

fn offer(entry: &Entry, order: &[u8]) -> anyhow::Result<Option<BufReader<UnixStream>>> {
    let path = socket(&entry.path);
    if !path.exists() {
        return Ok(None);
    }
    let mut stream = UnixStream::connect(path)?;
    if socket_peercred(&stream)?.uid != geteuid() {
        bail!("It belongs to another user");
    }
    stream.set_read_timeout(Some(WORD_LIMIT))?;
    stream.set_write_timeout(Some(WORD_LIMIT))?;
    stream.write_all(order)?;
    stream.shutdown(Shutdown::Write)?;
    let mut stream = BufReader::new(stream);
    match Answer::read(&mut stream)? {
        Some(Answer::Taken) => {
            // Each step of the mount has a limit of its own.
            stream.get_ref().set_read_timeout(None)?;
            Ok(Some(stream))
        }
        _ => Ok(None),
    }
}
