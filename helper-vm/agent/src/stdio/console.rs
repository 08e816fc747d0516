//! Receives a pseudo-terminal's master from the process that opened it inside the container.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixListener;

/// The master comes before the helper tells of the process: it is there already, or never.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// A socket that takes one master.
pub struct ConsoleSocket(UnixListener);

impl ConsoleSocket {
    /// Binds the socket.
    pub fn bind(path: &Path) -> io::Result<Self> {
        UnixListener::bind(path).map(Self)
    }

    /// Takes the master.
    pub async fn receive(self) -> io::Result<OwnedFd> {
        tokio::time::timeout(TIME_LIMIT, self.take()).await?
    }

    async fn take(self) -> io::Result<OwnedFd> {
        let (stream, _) = self.0.accept().await?;
        stream.readable().await?;
        stream.try_io(Interest::READABLE, || receive_fd(stream.as_fd()))
    }
}

fn receive_fd(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(socket, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let fds = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.ok_or_else(|| io::Error::other("the console socket carried no descriptor"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    #[tokio::test]
    async fn the_descriptor_arrives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tty");
        let socket = ConsoleSocket::bind(&path).unwrap();
        let sender = UnixStream::connect(&path).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [writer.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&sender, &[IoSlice::new(b"/dev/ptmx")], &mut ancillary, SendFlags::empty()).unwrap();
        let received = socket.receive().await.unwrap();
        drop(writer);
        rustix::io::write(&received, b"x").unwrap();
        drop(received);
        assert_eq!(std::io::read_to_string(reader).unwrap(), "x");
    }
}
