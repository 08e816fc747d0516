//! The control socket between the caller and a starting daemon: one order, one answer.
//!
//! ```text
//!   caller                                             daemon (its end is stdin)
//!     ── length (u32, little-endian) + listener fd ───>
//!     ── the spec as JSON, `length` bytes ────────────>
//!     <──────────── "ready\n" or "error MESSAGE\n" ────
//! ```
//!
//! Both ends close it then. An end of file instead of an answer means that the daemon died.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use super::ShareSpec;

/// The largest spec, as JSON: 500 layers and 1024 volumes with long paths fit several times.
const MAX_SPEC: u32 = 4 << 20;

/// The longest answer: a message with a few paths in it.
const MAX_ANSWER: u64 = 64 << 10;

const READY: &str = "ready";
const ERROR: &str = "error ";

/// The two sides of the control socket did not understand each other.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("control socket")]
    Io(#[from] io::Error),
    /// The spec does not parse or cannot be written as JSON (a path that is not UTF-8).
    #[error("share spec is not valid")]
    Json(#[from] serde_json::Error),
    /// Longer than any spec with a reason.
    #[error("share spec of {0} bytes is longer than {MAX_SPEC}")]
    TooLong(usize),
    /// The order came without exactly one listening socket.
    #[error("control socket brought no listening socket: start vmctr-fsd through the shim, not by hand")]
    NoListener,
    /// The answer is neither of the two.
    #[error("daemon answered with {0:?}")]
    Answer(String),
}

/// How the daemon's start ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It serves.
    Ready,
    /// It gave up, for this reason.
    Failed(String),
    /// It died without a word.
    Gone,
}

/// Sends the order.
pub(super) fn send_order(
    socket: &mut UnixStream,
    spec: &ShareSpec,
    listener: &UnixListener,
) -> Result<(), ControlError> {
    let json = serde_json::to_vec(spec)?;
    let length = u32::try_from(json.len()).ok().filter(|length| *length <= MAX_SPEC);
    let length = length.ok_or(ControlError::TooLong(json.len()))?.to_le_bytes();
    let fds = [listener.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = rustix::net::sendmsg(&*socket, &[IoSlice::new(&length)], &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(io::Error::from)?;
    socket.write_all(&length[sent..])?;
    Ok(socket.write_all(&json)?)
}

/// Waits for the answer, at most `patience` for each read.
pub(super) fn receive_answer(socket: &UnixStream, patience: Duration) -> Result<Answer, ControlError> {
    socket.set_read_timeout(Some(patience))?;
    let mut text = String::new();
    socket.take(MAX_ANSWER).read_to_string(&mut text)?;
    match text.strip_suffix('\n') {
        None if text.is_empty() => Ok(Answer::Gone),
        Some(READY) => Ok(Answer::Ready),
        Some(line) if line.starts_with(ERROR) => Ok(Answer::Failed(line[ERROR.len()..].to_owned())),
        _ => Err(ControlError::Answer(text)),
    }
}

/// Receives the order. Every descriptor that came along is closed on error.
pub(super) fn receive_order(socket: &mut UnixStream) -> Result<(ShareSpec, UnixListener), ControlError> {
    let mut length = [0; 4];
    let (received, listener) = receive_with_fd(socket, &mut length)?;
    socket.read_exact(&mut length[received..])?;
    let length = u32::from_le_bytes(length);
    if length > MAX_SPEC {
        return Err(ControlError::TooLong(length as usize));
    }
    let mut json = vec![0; length as usize];
    socket.read_exact(&mut json)?;
    let listener = listener.ok_or(ControlError::NoListener)?;
    Ok((serde_json::from_slice(&json)?, UnixListener::from(listener)))
}

fn receive_with_fd(socket: &UnixStream, buffer: &mut [u8]) -> Result<(usize, Option<OwnedFd>), ControlError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message =
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            .map_err(|error| match error {
                rustix::io::Errno::NOTSOCK => ControlError::NoListener,
                error => ControlError::Io(error.into()),
            })?;
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((message.bytes, fd))
}

/// Tells the caller that the daemon serves.
pub(super) fn send_ready(socket: &UnixStream) -> io::Result<()> {
    send_line(socket, READY)
}

/// Tells the caller why the daemon does not serve.
pub(super) fn send_error(socket: &UnixStream, message: &str) -> io::Result<()> {
    send_line(socket, &format!("{ERROR}{}", message.replace('\n', " ")))
}

/// Uses write(2): a confined daemon may not call sendto(2), which the standard library's sockets do.
fn send_line(socket: &UnixStream, text: &str) -> io::Result<()> {
    let line = format!("{text}\n");
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        let written = rustix::io::write(socket, rest)?;
        rest = &rest[written..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn listener() -> UnixListener {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("vmctr-fsd-test-{}-{:?}", std::process::id(), std::thread::current().id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
        UnixListener::bind_addr(&address).unwrap()
    }

    #[test]
    fn an_order_arrives_with_its_listener() {
        let (mut caller, mut daemon) = UnixStream::pair().unwrap();
        let spec = ShareSpec { lowers: vec!["/l".into()], ..ShareSpec::new() };
        let sent = listener();
        send_order(&mut caller, &spec, &sent).unwrap();
        let (received, socket) = receive_order(&mut daemon).unwrap();
        assert_eq!(received, spec);
        assert_ne!(socket.as_raw_fd(), sent.as_raw_fd());
        let name = |socket: &UnixListener| socket.local_addr().unwrap().as_pathname().map(ToOwned::to_owned);
        assert_eq!(name(&socket), name(&sent));
    }

    #[test]
    fn an_order_without_listener_is_refused() {
        let (mut caller, mut daemon) = UnixStream::pair().unwrap();
        let json = serde_json::to_vec(&ShareSpec::new()).unwrap();
        caller.write_all(&u32::try_from(json.len()).unwrap().to_le_bytes()).unwrap();
        caller.write_all(&json).unwrap();
        assert!(matches!(receive_order(&mut daemon), Err(ControlError::NoListener)));
    }

    #[test]
    fn an_endless_order_is_refused_before_it_is_read() {
        let (mut caller, mut daemon) = UnixStream::pair().unwrap();
        caller.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(receive_order(&mut daemon), Err(ControlError::TooLong(_))));
    }

    #[test]
    fn answers_come_back_as_sent() {
        let answer = |send: &dyn Fn(&mut UnixStream)| {
            let (caller, mut daemon) = UnixStream::pair().unwrap();
            send(&mut daemon);
            drop(daemon);
            receive_answer(&caller, Duration::from_secs(1))
        };
        assert_eq!(answer(&|s| send_ready(s).unwrap()).unwrap(), Answer::Ready);
        let failed = answer(&|s| send_error(s, "no /x:\nnot found").unwrap()).unwrap();
        assert_eq!(failed, Answer::Failed("no /x: not found".into()));
        assert_eq!(answer(&|_| ()).unwrap(), Answer::Gone);
        assert!(answer(&|s| s.write_all(b"hello\n").unwrap()).is_err());
    }

    #[test]
    fn a_silent_daemon_is_not_waited_for_without_end() {
        let (caller, _daemon) = UnixStream::pair().unwrap();
        assert!(receive_answer(&caller, Duration::from_millis(10)).is_err());
    }
}
