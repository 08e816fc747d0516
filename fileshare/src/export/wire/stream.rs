//! A connected socket, and the messages on it.
//!
//! A message is one of the kernel's own: its first four bytes are its length. [`Inbox`] hands them out one by
//! one and holds at most the longest that it was told to expect.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType};

/// What a small read takes at once. Most messages are shorter, and then come with one system call.
const GULP: usize = 64 * 1024;

/// A connected stream socket, of whatever family.
#[derive(Debug)]
pub struct Stream(OwnedFd);

/// The stream is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other side closed it.
    #[error("The other side closed the stream")]
    Closed,
    /// It failed.
    #[error("The stream failed")]
    Failed(#[source] io::Error),
    /// A length that no message has.
    #[error("The other side announced a message of {0} bytes")]
    Length(u32),
}

impl From<Errno> for StreamError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::Failed(other.into()),
        }
    }
}

impl<T: Into<OwnedFd>> From<T> for Stream {
    fn from(socket: T) -> Self {
        Self(socket.into())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream {
    /// Two connected streams.
    ///
    /// # Errors
    /// There are no more descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    /// Makes the stream wait, whoever had it before, and for how long at most: writing without limit would be as
    /// much a hang as reading. `None` is without limit.
    ///
    /// # Errors
    /// It is no socket.
    pub fn set_limits(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&self.0, false)?;
        set_socket_timeout(&self.0, Timeout::Recv, read)?;
        Ok(set_socket_timeout(&self.0, Timeout::Send, write)?)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn write_all(&self, mut bytes: &[u8]) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Fills `bytes`.
    ///
    /// # Errors
    /// The other side is gone.
    pub fn read_exact(&self, bytes: &mut [u8]) -> Result<(), StreamError> {
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read(&mut bytes[filled..])?;
        }
        Ok(())
    }

    fn read(&self, bytes: &mut [u8]) -> Result<usize, StreamError> {
        loop {
            match rustix::io::read(&self.0, &mut *bytes) {
                Ok(0) => return Err(StreamError::Closed),
                Ok(count) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Ends the stream in both directions; whoever waits on it returns.
    pub fn shutdown(&self) {
        // It may have ended by itself.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

/// Cuts a stream into messages.
#[derive(Debug, Default)]
pub struct Inbox {
    buffer: Vec<u8>,
    /// The message that was handed out last.
    last: std::ops::Range<usize>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// Waits for the next message, of `shortest` to `longest` bytes.
    ///
    /// # Errors
    /// The stream ended, or the message's length is not within the bounds. Then the rest of the stream has no
    /// meaning.
    pub fn next(
        &mut self,
        stream: &Stream,
        shortest: usize,
        longest: usize,
    ) -> Result<&mut [u8], StreamError> {
        self.fill(stream, 4)?;
        let mut length = [0; 4];
        length.copy_from_slice(&self.buffer[self.start..self.start + 4]);
        let announced = u32::from_le_bytes(length);
        let length = announced as usize;
        if length < shortest.max(4) || length > longest {
            return Err(StreamError::Length(announced));
        }
        self.fill(stream, length)?;
        self.last = self.start..self.start + length;
        self.start += length;
        Ok(self.last())
    }

    /// The message that was handed out last.
    pub fn last(&mut self) -> &mut [u8] {
        &mut self.buffer[self.last.clone()]
    }

    /// Whether more was read than was handed out.
    pub fn has_more(&self) -> bool {
        self.end > self.start
    }

    fn fill(&mut self, stream: &Stream, wanted: usize) -> Result<(), StreamError> {
        if self.end - self.start >= wanted {
            return Ok(());
        }
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let room = wanted.max(GULP);
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        while self.end < wanted {
            self.end += stream.read(&mut self.buffer[self.end..])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut message: Vec<u8> = (0..length).map(|at| at as u8).collect();
        message[..4].copy_from_slice(&(length as u32).to_le_bytes());
        message
    }

    #[test]
    fn lengths_out_of_bounds_end_the_stream() {
        for length in [0u32, 3, 15, 101, u32::MAX] {
            let (ours, theirs) = Stream::pair().unwrap();
            theirs.write_all(&length.to_le_bytes()).unwrap();
            let heard = Inbox::default().next(&ours, 16, 100).map(|_| ());
            assert!(matches!(heard, Err(StreamError::Length(l)) if l == length), "{length}");
        }
    }

    #[test]
    fn a_message_cut_short_is_an_end() {
        let (ours, theirs) = Stream::pair().unwrap();
        theirs.write_all(&message(64)[..63]).unwrap();
        drop(theirs);
        assert!(matches!(Inbox::default().next(&ours, 16, 100), Err(StreamError::Closed)));
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in(
            lengths in prop::collection::vec(16usize..5000, 1..20),
            cut in 1usize..4000,
        ) {
            let (ours, theirs) = Stream::pair().unwrap();
            let sent: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
            std::thread::scope(|scope| {
                scope.spawn(|| sent.chunks(cut).for_each(|part| theirs.write_all(part).unwrap()));
                let mut inbox = Inbox::default();
                for length in &lengths {
                    assert_eq!(inbox.next(&ours, 16, 5000).unwrap(), message(*length));
                }
            });
        }
    }
}
