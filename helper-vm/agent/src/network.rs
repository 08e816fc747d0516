//! A network namespace that waits for its container.
//!
//! Making one, and bringing its loopback interface up, is a tenth of what the guest does for a container. So one
//! is made ahead where there is time: before a template is saved, and while a VM of the pool waits. A container
//! that finds none makes its own. None is ever used twice.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use crate::sys::loopback_up;

/// A namespace in which no process is yet; it goes with its last user.
#[derive(Debug)]
pub struct Network(OwnedFd);

impl Network {
    /// Makes one, with a loopback interface that is up.
    pub fn make() -> io::Result<Self> {
        // A thread of its own, which ends in the new namespace; all others stay in theirs.
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            loopback_up()?;
            File::open("/proc/thread-self/ns/net")
        });
        let made = made.join().map_err(|_| io::Error::other("the thread that makes it failed"))?;
        made.map(|file| Self(file.into()))
    }

    /// Where a process of the guest finds it, as long as this is kept.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}
