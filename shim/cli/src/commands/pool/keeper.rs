//! Keeps one place of the pool filled.
//!
//! ```text
//!   start a member ── Ready ── waits ──┬── taken ───────> the next at once; the member is nobody's child to kill
//!        ^                             └── died ── told ─> the next
//!        └── a pause, when it died before it was ready ──┘
//! ```

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context, bail};
use vmctr_vmm::binaries;
use vmctr_vmm::pool::wire::receive;
use vmctr_vmm::pool::{MEMBER_ACTION, MEMBER_PROGRAM, Ready};

use super::members::Members;
use crate::failure::one_line;

/// After a failure: what keeps a VM from starting mostly lasts.
const PAUSE: Duration = Duration::from_secs(10);

/// From a member's start until its VM waits: the making of a template included.
const READY_LIMIT: Duration = Duration::from_secs(300);

/// Never returns.
pub fn keep(members: &Members) {
    loop {
        match fill(members) {
            Ok(true) => {}
            Ok(false) => eprintln!("vmctr: a waiting VM has ended; it is replaced"),
            Err(error) => {
                eprintln!("vmctr: {}", one_line(&error));
                sleep(PAUSE);
            }
        }
    }
}

/// Starts a member and waits until the place is empty again: `true` when the member was taken.
fn fill(members: &Members) -> anyhow::Result<bool> {
    let (ours, theirs) = UnixStream::pair().context("Cannot make a socket pair")?;
    let mut child = start(theirs)?;
    let (pid, ours) = (child.id(), Arc::new(ours));
    members.add(pid, Arc::clone(&ours));
    let ready = wait_until_ready(&ours);
    if let Ok(ready) = &ready {
        members.ready(pid, ready.qemu);
        // It says nothing more; its end, or the end of its interest in the pool, closes the socket.
        let _ = receive::<Ready>(&ours);
    }
    let taken = !members.remove(pid);
    if !taken {
        // It ends by itself when the socket closes, unless it hangs.
        let _ = child.kill();
    }
    reap(child);
    ready.map(|_| taken)
}

fn start(socket: UnixStream) -> anyhow::Result<Child> {
    let mut command = Command::new(binaries::find(MEMBER_PROGRAM)?);
    command.arg(MEMBER_ACTION).stdin(OwnedFd::from(socket)).stdout(Stdio::null()).current_dir("/");
    command.spawn().context("Cannot start a member of the pool")
}

fn wait_until_ready(socket: &UnixStream) -> anyhow::Result<Ready> {
    socket.set_read_timeout(Some(READY_LIMIT))?;
    let ready = receive(socket).context("A member of the pool does not get ready")?;
    socket.set_read_timeout(None)?;
    match ready {
        Some((ready, _)) => Ok(ready),
        None => bail!("A member of the pool ended before its VM was ready"),
    }
}

/// A member that was taken lives as long as its container.
fn reap(mut child: Child) {
    let reaper = thread::Builder::new().name("reaper".to_owned());
    // Without the thread it stays a zombie until this process ends, no more.
    let _ = reaper.spawn(move || child.wait());
}
