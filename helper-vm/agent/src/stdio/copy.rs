//! The copying threads: blocking reads and writes, nothing shared.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::net::{Shutdown, shutdown};

/// One virtio-vsock packet's worth, and a whole pipe's.
const BUFFER: usize = 64 << 10;
/// Stack of a copying thread: its buffer is on the heap.
const STACK: usize = 64 << 10;

/// Copies what a process writes to the host, until every writer is gone; then ends the stream.
pub fn output(process: OwnedFd, stream: OwnedFd) -> io::Result<()> {
    spawn(move || {
        // Whichever side is gone, the other learns it by the close: the host sees the end of the stream,
        // the process SIGPIPE.
        let _ = copy_output(&process, &stream);
        let _ = shutdown(&stream, Shutdown::Write);
    })
}

/// Copies what the host sends to a process, until the host closes its half or every reader is gone.
pub fn input(stream: OwnedFd, process: OwnedFd) -> io::Result<()> {
    spawn(move || {
        let _ = copy_input(&stream, &process);
    })
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("stdio".to_owned()).stack_size(STACK).spawn(work).map(drop)
}

fn copy_output(from: &OwnedFd, to: &OwnedFd) -> rustix::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match retry_on_intr(|| read(from, &mut *buffer)) {
            // A pseudo-terminal without users answers EIO instead of end of file.
            Ok(0) | Err(Errno::IO) => return Ok(()),
            Ok(length) => write_all(to, &buffer[..length])?,
            Err(error) => return Err(error),
        }
    }
}

fn copy_input(from: &OwnedFd, to: &OwnedFd) -> rustix::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    while wait_for_input(from, to)? {
        match retry_on_intr(|| read(from, &mut *buffer))? {
            0 => return Ok(()),
            length => write_all(to, &buffer[..length])?,
        }
    }
    Ok(())
}

/// Waits for the host's bytes or its close; false when nobody reads them any more.
fn wait_for_input(from: &OwnedFd, to: &OwnedFd) -> rustix::io::Result<bool> {
    let mut fds = [PollFd::new(from, PollFlags::IN), PollFd::new(to, PollFlags::empty())];
    retry_on_intr(|| poll(&mut fds, None))?;
    Ok(!fds[1].revents().intersects(PollFlags::ERR | PollFlags::HUP))
}

fn write_all(to: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let written = retry_on_intr(|| write(to.as_fd(), bytes))?;
        bytes = &bytes[written..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn output_arrives_whole_and_ends_with_its_last_writer() {
        let (reader, writer) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        output(reader, guest.into()).unwrap();
        let data: Vec<u8> = (0..1_000_003_u32).map(|i| (i % 251) as u8).collect();
        let (mut one, other) = (File::from(writer.try_clone().unwrap()), writer);
        let sent = data.clone();
        let sender = std::thread::spawn(move || one.write_all(&sent).unwrap());
        let mut received = vec![0; data.len()];
        host.read_exact(&mut received).unwrap();
        assert!(received == data);
        sender.join().unwrap();
        drop(other);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn input_ends_with_the_hosts_half() {
        let (reader, writer) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        input(guest.into(), writer).unwrap();
        host.write_all(b"hello").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let mut received = String::new();
        File::from(reader).read_to_string(&mut received).unwrap();
        assert_eq!(received, "hello");
    }

    #[test]
    fn input_ends_with_its_last_reader() {
        let (reader, writer) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        input(guest.into(), writer).unwrap();
        drop(reader);
        // The host sees the connection close although it sent nothing.
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
}
