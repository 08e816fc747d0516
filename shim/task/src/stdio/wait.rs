//! Waiting that can be called off: every blocking step of a copy thread ends when its [`Cancel`] fires.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// Calls off all waits that look at it, for good. Clones are the same.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<OwnedFd>);

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// One of the events is there.
    Ready,
    /// Called off.
    Cancelled,
    /// The time is over.
    Timeout,
}

impl Cancel {
    /// A fresh one.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Ends all waits, now and later: nobody reads the counter, so it stays readable.
    pub fn fire(&self) {
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Waits for one of `events`.
    pub fn wait(&self, events: &[(&dyn AsFd, PollFlags)], limit: Option<Duration>) -> io::Result<Woken> {
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let mut fds: Vec<PollFd<'_>> =
            events.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(fd.as_fd(), *flags)).collect();
        fds.push(PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN));
        loop {
            match poll(&mut fds, limit.as_ref()) {
                Ok(0) => return Ok(Woken::Timeout),
                Ok(_) if fds.last().is_some_and(|own| !own.revents().is_empty()) => {
                    return Ok(Woken::Cancelled);
                }
                Ok(_) => return Ok(Woken::Ready),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    fn a_wait_ends_by_event_by_time_or_by_call() {
        let cancel = Cancel::new().unwrap();
        let (a, b) = UnixStream::pair().unwrap();
        let short = Some(Duration::from_millis(5));
        assert_eq!(cancel.wait(&[(&a, PollFlags::IN)], short).unwrap(), Woken::Timeout);
        rustix::io::write(&b, b"x").unwrap();
        assert_eq!(cancel.wait(&[(&a, PollFlags::IN)], None).unwrap(), Woken::Ready);

        let other = cancel.clone();
        let waiter = thread::spawn(move || other.wait(&[(&b, PollFlags::IN)], None).unwrap());
        cancel.fire();
        assert_eq!(waiter.join().unwrap(), Woken::Cancelled);
        assert_eq!(cancel.wait(&[], None).unwrap(), Woken::Cancelled);
    }
}
