//! Who uses which folder: a lock on each, which goes with its holder however that ends.
//!
//! Upper and work folder belong to one union alone; a lower folder may be in many, as long as nobody's changes land
//! there.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::order::Order;

/// A union that was unmounted a moment ago still writes its changes to disk.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);

/// The folders of a mount, locked. A container's has none.
#[derive(Debug)]
pub struct Locks(#[expect(dead_code, reason = "held for their locks")] Vec<File>);

/// A folder cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else changes it, or relies on its not being changed.
    #[error("{} is in use by another union or container", .0.display())]
    InUse(PathBuf),
    /// It cannot be opened or locked.
    #[error("Cannot lock {}", .0.display())]
    Io(PathBuf, #[source] io::Error),
}

impl Locks {
    /// Locks all folders of the union. Blocks for a while where one is in use.
    pub fn take(order: &Order) -> Result<Self, LockError> {
        let until = Instant::now() + PATIENCE;
        let (lowers, top) = order.folders();
        let lowers = lowers.iter().map(|path| (path, FlockOperation::NonBlockingLockShared));
        let top = top.into_iter().map(|path| (path, FlockOperation::NonBlockingLockExclusive));
        top.chain(lowers).map(|(path, how)| lock(path, how, until)).collect::<Result<_, _>>().map(Self)
    }
}

fn lock(path: &Path, how: FlockOperation, until: Instant) -> Result<File, LockError> {
    let failed = |error| LockError::Io(path.to_owned(), error);
    let folder = File::open(path).map_err(failed)?;
    loop {
        match flock(&folder, how) {
            Ok(()) => return Ok(folder),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => sleep(POLL),
            Err(Errno::WOULDBLOCK) => return Err(LockError::InUse(path.to_owned())),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}
