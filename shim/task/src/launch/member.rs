//! `warm`: a server without a container, whose VM waits. Started by `vmctr pool run`, with a socket to it as
//! standard input.
//!
//! ```text
//!   VM restored, rehearsed, paused ── Ready ──> pool
//!   pool ── Order, bundle, pipe ──> from here on the server of that container (`server`)
//!   the pool's end is closed, or the VM ends ──> everything is taken down
//! ```

use std::io::stdin;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, bail};
use containerd_shim::Flags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{fchdir, setsid};
use tokio::task::spawn_blocking;
use vmctr_vmm::config::Config;
use vmctr_vmm::pool::wire::{receive, send};
use vmctr_vmm::pool::{Order, Ready};

use super::server;
use crate::sandbox::Warm;

/// Waits, then serves until it is over.
pub async fn run() -> Result<()> {
    let pool = UnixStream::from(stdin().as_fd().try_clone_to_owned().context("take the pool's socket")?);
    // The terminal's signals are for the pool, whose end is what tells the members.
    let _ = setsid();
    let config = Config::load()?;
    let warm = tokio::select! {
        warm = Warm::start(&config) => warm.context("prepare a VM")?,
        () = closed(&pool)? => return Ok(()),
    };
    send(&pool, &Ready { qemu: warm.vm().qemu_pid() }, &[]).context("tell the pool")?;
    let vm = warm.vm().clone();
    let order = tokio::select! {
        order = spawn_blocking(move || receive::<Order>(&pool)) => order.context("wait for an order")?,
        end = vm.ended() => bail!("the VM ended while it waited: {end:?}"),
    };
    drop(vm);
    let Some((order, fds)) = order.context("wait for an order")? else {
        warm.discard().await;
        return Ok(());
    };
    let fds: [OwnedFd; 2] = fds.try_into().map_err(|_| anyhow!("an order brings two descriptors"))?;
    if is_given_up(&fds[1])? {
        warm.discard().await;
        bail!("The order for container {} came too late: it has another VM", order.id);
    }
    become_server_of(fds)?;
    let Order { namespace, id, address, socket, ttrpc_address, debug, .. } = order;
    let flags = Flags { namespace, id, address, socket, debug, ..Flags::default() };
    server::run(&flags, &ttrpc_address, Some(warm)).await
}

/// Returns when the pool has gone, which it tells by closing the socket; it says nothing before it was told that
/// the VM waits.
fn closed(pool: &UnixStream) -> Result<impl Future<Output = ()> + use<>> {
    let pool = crate::sys::watch_readable(pool.try_clone()?.into()).context("watch the pool's socket")?;
    Ok(async move {
        // A socket that cannot be watched is as bad as a pool that is gone.
        let _ = pool.readable().await;
    })
}

/// Whether `start`, at the other end of the pipe, waits no more: it has made a server of its own, and nobody would
/// ever tell this one to end.
fn is_given_up(words: &OwnedFd) -> Result<bool> {
    let mut pipe = [PollFd::new(words, PollFlags::empty())];
    poll(&mut pipe, Some(&Timespec::default())).context("look for who gave the order")?;
    Ok(pipe[0].revents().contains(PollFlags::ERR))
}

/// What `start` would have given to a server of its own: the bundle as working directory, its pipe as standard
/// output and error.
fn become_server_of([bundle, words]: [OwnedFd; 2]) -> Result<()> {
    fchdir(&bundle).context("enter the bundle")?;
    let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdin(&null).context("leave the pool")?;
    rustix::stdio::dup2_stdout(&words).context("take the pipe")?;
    rustix::stdio::dup2_stderr(&words).context("take the pipe")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_given_up_when_nobody_reads_the_pipe() {
        let (reader, writer) = std::io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        assert!(!is_given_up(&writer).unwrap());
        drop(reader);
        assert!(is_given_up(&writer).unwrap());
    }
}
