//! One message with its file descriptors over a stream socket.
//!
//! ```text
//!   length (u32, little-endian), the descriptors with its first byte ── the message as JSON, `length` bytes
//! ```
//!
//! Only root can reach the sockets, and each end checks that the other is root; lengths are bounded all the same.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Far above any message.
const MAX_LENGTH: usize = 1 << 20;

/// As many as any message brings.
const MAX_FDS: usize = 4;

/// Sends a message.
///
/// # Errors
/// As write(2).
pub fn send(stream: &UnixStream, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?.to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let sent = sendmsg(stream, &[IoSlice::new(&length)], &mut control, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(&length[sent..])?;
    stream.write_all(&body)
}

/// Receives a message and its descriptors; `None` when the other end is closed.
///
/// # Errors
/// As read(2); a message that is cut, too long, or none of the type.
pub fn receive<T: DeserializeOwned>(stream: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut length)], &mut control, flags)?.bytes;
    if received == 0 {
        return Ok(None);
    }
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => vec![],
    });
    let fds = fds.collect();
    let mut stream = stream;
    stream.read_exact(&mut length[received..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_LENGTH {
        return Err(io::Error::other(format!("a message of {length} bytes is too long")));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(Some((serde_json::from_slice(&body)?, fds)))
}

/// Fails unless the process at the other end belongs to root.
///
/// # Errors
/// It does not, or the kernel does not tell.
pub fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let uid = socket_peercred(stream)?.uid;
    if uid.is_root() {
        return Ok(());
    }
    let message = format!("user {} is not root", uid.as_raw());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::pool::Ask;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"x").unwrap();
        send(&ours, &Ask::List, &[file.as_fd(), ours.as_fd()]).unwrap();
        send(&ours, &Ask::List, &[]).unwrap();
        let (message, fds) = receive::<Ask>(&theirs).unwrap().unwrap();
        assert_eq!((message, fds.len()), (Ask::List, 2));
        let same = File::from(fds.into_iter().next().unwrap());
        assert_eq!(same.metadata().unwrap().len(), 1);
        drop(same);
        assert!(receive::<Ask>(&theirs).unwrap().unwrap().1.is_empty());
        check_peer(&ours).unwrap();
    }

    #[test]
    fn the_end_is_no_message_and_rubbish_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(receive::<Ask>(&theirs).unwrap_err().to_string().contains("too long"));
        (&ours).write_all(&[2, 0, 0, 0, b'n', b'o']).unwrap();
        assert!(receive::<Ask>(&theirs).is_err());
        (&ours).write_all(&[2, 0]).unwrap();
        drop(ours);
        assert!(receive::<Ask>(&theirs).is_err());
        assert!(receive::<Ask>(&theirs).unwrap().is_none());
    }
}
