//! Watches for OOM kills: the kernel announces a change of `memory.events` to inotify.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::Handle;

/// Some events' worth; their content does not matter.
const BUFFER: usize = 1024;

/// The kernel's list of watched files.
pub struct Watch(OwnedFd);

impl Watch {
    /// Starts watching; [`add`](Self::add) names the files.
    pub fn start(guest: Handle) -> io::Result<Self> {
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // An inotify descriptor is read like a pipe.
        let mut changes = Receiver::from_owned_fd_unchecked(inotify.try_clone()?)?;
        tokio::spawn(async move {
            let mut events = [0; BUFFER];
            while changes.read(&mut events).await.is_ok() {
                guest.call(super::Guest::report_ooms).await;
            }
        });
        Ok(Self(inotify))
    }

    /// Watches a group's `memory.events`, until the group is removed.
    pub fn add(&self, memory_events: &Path) -> io::Result<()> {
        add_watch(&self.0, memory_events, WatchFlags::MODIFY)?;
        Ok(())
    }
}
