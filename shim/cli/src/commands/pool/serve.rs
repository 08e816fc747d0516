//! The pool's socket. One client after the other: each says one thing and gets one answer at once.

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmctr_vmm::config::Config;
use vmctr_vmm::pool::wire::{check_peer, receive, send};
use vmctr_vmm::pool::{Answer, Ask, Order, config_digest};

use super::members::Members;

/// A client says what it wants at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// The caller holds the pool's lock: a socket that is there belongs to nobody any more.
pub fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("Cannot remove {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("Cannot listen on {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves for ever.
pub fn serve(listener: &UnixListener, members: &Members, config: &Config) -> anyhow::Result<()> {
    let digest = config_digest(config);
    for client in listener.incoming() {
        let served = client.and_then(|client| answer(&client, members, &digest));
        if let Err(error) = served {
            eprintln!("vmctr: a client of the pool: {error}");
        }
    }
    Ok(())
}

fn answer(client: &UnixStream, members: &Members, digest: &str) -> std::io::Result<()> {
    check_peer(client)?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let Some((ask, fds)) = receive::<Ask>(client)? else { return Ok(()) };
    let answer = match ask {
        Ask::List => Answer::List(members.list()),
        // It waits no longer, as this process was held up: the VM would be nobody's.
        Ask::Take(_) if is_gone(client)? => return Ok(()),
        Ask::Take(order) => take(members, &order, &fds, digest),
    };
    send(client, &answer, &[])
}

/// Whether the client has closed its end.
fn is_gone(client: &UnixStream) -> std::io::Result<bool> {
    let mut ends = [PollFd::new(client, PollFlags::RDHUP)];
    poll(&mut ends, Some(&Timespec::default()))?;
    Ok(!ends[0].revents().is_empty())
}

fn take(members: &Members, order: &Order, fds: &[OwnedFd], digest: &str) -> Answer {
    if order.config != digest {
        let why = "it was started with another configuration: restart `vmctr pool run`";
        return Answer::Refused(why.to_owned());
    }
    members.give(order, fds).map_or(Answer::Empty, Answer::Taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_gone_when_its_end_is_closed_whatever_it_said_before() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, &Ask::List, &[]).unwrap();
        assert!(!is_gone(&ours).unwrap());
        drop(theirs);
        assert!(is_gone(&ours).unwrap());
    }
}
