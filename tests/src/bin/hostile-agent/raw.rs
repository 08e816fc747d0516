//! Bytes on the agent's port that are no gRPC, or too much of it.
//!
//! HTTP/2 frame: 3 bytes length, 1 type, 1 flags, 4 stream number, all big-endian. Source: RFC 9113, section 4.1.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::thread;

use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};
use vmctr_proto::ports;

use crate::{rest, say_ready};

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;

/// What a connection gets.
#[derive(Clone, Copy)]
pub enum Misbehaviour {
    /// Nothing, for ever.
    Silence,
    /// Its end, at once.
    Close,
    /// Bytes that mean nothing.
    Garbage,
    /// Settings without end.
    Settings,
    /// Pings without end, each wanting an answer that nobody reads.
    Pings,
    /// One reply whose headers never end.
    Headers,
}

impl Misbehaviour {
    /// The one that a test asks for.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "silence" => Self::Silence,
            "close" => Self::Close,
            "garbage" => Self::Garbage,
            "settings" => Self::Settings,
            "pings" => Self::Pings,
            "headers" => Self::Headers,
            _ => return None,
        })
    }

    fn inflict(self, mut connection: File) -> std::io::Result<()> {
        match self {
            Self::Silence => rest(),
            Self::Close => Ok(()),
            Self::Garbage => pour(&mut connection, &[0x5a; 4096]),
            Self::Settings => pour(&mut connection, &frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100])),
            Self::Pings => {
                connection.write_all(&frame(SETTINGS, 0, 0, &[]))?;
                pour(&mut connection, &frame(PING, 0, 0, &[7; 8]).repeat(64))
            }
            Self::Headers => {
                connection.write_all(&frame(SETTINGS, 0, 0, &[]))?;
                connection.write_all(&frame(HEADERS, 0, 1, &[0x88]))?;
                // A literal header of one byte with an empty value, again and again.
                pour(&mut connection, &frame(CONTINUATION, 0, 1, &[0x00, 1, b'a', 0].repeat(1024)))
            }
        }
    }
}

/// Says READY and treats each connection so.
pub fn serve(misbehaviour: Misbehaviour) {
    let listener =
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("vsock");
    bind(listener.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, ports::AGENT)).expect("the port is free");
    listen(&listener, Backlog::MAXCONN).expect("it is bound");
    say_ready();
    while let Ok(fd) = accept(listener.as_raw_fd()) {
        // SAFETY: accept(2) has just made this descriptor, and nobody else knows it.
        let connection = unsafe { File::from_raw_fd(fd) };
        thread::spawn(move || misbehaviour.inflict(connection));
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn pour(connection: &mut File, bytes: &[u8]) -> std::io::Result<()> {
    loop {
        connection.write_all(bytes)?;
    }
}
