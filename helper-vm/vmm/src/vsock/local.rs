//! The host's end of a connection: a nonblocking stream socket and what could not be written to it yet.
//!
//! The other end of the socket belongs to whoever uses the connection (an in-process stream, or a client
//! of the per-VM socket). What that user does is seen here:
//!
//! ```text
//!   user                          here
//!   shutdown(Write)               read gives end of file               -> ended
//!   shutdown(Read)                write gives EPIPE                    -> deaf
//!   close                         both; poll gives POLLHUP             -> deaf, and ended once drained
//!   reads slowly                  write gives EAGAIN, backlog grows    -> credit is withheld
//! ```
//!
//! Readiness is edge-triggered: `readable` and `writable` are hints that hold until a call says EAGAIN.
//! A wrong hint costs one system call and nothing else, so events for an earlier user of a slot are harmless.
//! Writing relies on SIGPIPE being ignored, as it is in every Rust program.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::backlog::Backlog;

/// Hints of what a socket may now do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Readiness {
    /// A read may give bytes or the end of file.
    pub(super) readable: bool,
    /// A write may take bytes.
    pub(super) writable: bool,
    /// The user may have closed.
    pub(super) hangup: bool,
}

/// The device's end of the socket.
#[derive(Debug)]
pub(super) struct Local {
    stream: UnixStream,
    backlog: Backlog,
    readable: bool,
    writable: bool,
    ended: bool,
    deaf: bool,
    /// End of file is to follow the backlog.
    last: bool,
}

impl Local {
    /// `stream` is nonblocking. What it holds already shows in the first event.
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            backlog: Backlog::default(),
            readable: false,
            writable: true,
            ended: false,
            deaf: false,
            last: false,
        }
    }

    /// The user sends no more, and all that it sent has been read.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// The user takes no more.
    pub(super) fn deaf(&self) -> bool {
        self.deaf
    }

    /// A read is worth a try.
    pub(super) fn readable(&self) -> bool {
        self.readable && !self.ended
    }

    /// Bytes that wait to be written.
    pub(super) fn held(&self) -> usize {
        self.backlog.len()
    }

    /// Takes over hints and writes what can be written.
    pub(super) fn ready(&mut self, readiness: Readiness) {
        self.readable |= readiness.readable;
        self.writable |= readiness.writable;
        if readiness.hangup {
            self.look_for_hangup();
        }
        self.flush();
    }

    /// Reads up to `limit` bytes into guest memory.
    pub(super) fn read_into(&mut self, space: &[VolatileSlice<'_>], limit: usize) -> usize {
        let mut done = 0;
        for slice in space {
            let want = slice.len().min(limit - done);
            if want == 0 {
                continue;
            }
            let got = slice.subslice(0, want).map_or(0, |part| self.read(part));
            done += got;
            if got < want {
                break;
            }
        }
        done
    }

    /// Writes guest memory, keeping what the socket does not take.
    pub(super) fn write(&mut self, data: &[VolatileSlice<'_>]) {
        for slice in data {
            self.push(slice);
        }
    }

    /// Writes a few bytes ahead of everything else; false when the socket does not take them.
    pub(super) fn greet(&mut self, text: &str) -> bool {
        io::Write::write(&mut &self.stream, text.as_bytes()).is_ok_and(|n| n == text.len())
    }

    /// The guest sends no more: the user reads the end of file after the backlog.
    pub(super) fn finish_writing(&mut self) {
        self.last = true;
        self.end_if_last();
    }

    /// The guest takes no more: the user's writes fail with EPIPE.
    pub(super) fn stop_reading(&mut self) {
        self.ended = true;
        self.shut(Shutdown::Read);
    }

    fn read(&mut self, mut slice: VolatileSlice<'_>) -> usize {
        match retry(|| self.stream.read_volatile(&mut slice)) {
            Ok(0) => {
                self.ended = true;
                0
            }
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            // ECONNRESET: the user closed without reading all.
            Err(_) => {
                self.ended = true;
                self.go_deaf();
                0
            }
        }
    }

    fn push(&mut self, slice: &VolatileSlice<'_>) {
        let mut written = 0;
        while written < slice.len() && self.writable && !self.deaf && self.backlog.is_empty() {
            let Ok(rest) = slice.offset(written) else { return };
            let result = retry(|| self.stream.write_volatile(&rest));
            written += self.written(result);
        }
        if let Ok(rest) = slice.offset(written)
            && !self.deaf
        {
            self.backlog.push(&rest);
        }
    }

    fn flush(&mut self) {
        while !self.backlog.is_empty() && self.writable && !self.deaf {
            let result = self.backlog.write_to(&self.stream);
            self.written(result);
        }
        self.end_if_last();
    }

    /// Bytes that a write took; its failure changes what is known of the socket.
    fn written(&mut self, result: io::Result<usize>) -> usize {
        match result {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.writable = false;
                0
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => 0,
            Err(_) => {
                self.go_deaf();
                0
            }
        }
    }

    fn end_if_last(&mut self) {
        if self.last && self.backlog.is_empty() {
            self.last = false;
            self.shut(Shutdown::Write);
        }
    }

    /// Fails only on a socket whose user has closed, which the hang-up tells anyway.
    fn shut(&self, how: Shutdown) {
        let _ = self.stream.shutdown(how);
    }

    /// POLLHUP means that both directions are over, whoever ended them.
    fn look_for_hangup(&mut self) {
        let mut fds = [PollFd::new(&self.stream, PollFlags::empty())];
        let over = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if over {
            self.go_deaf();
        }
    }

    fn go_deaf(&mut self) {
        self.deaf = true;
        self.backlog.clear();
    }
}

impl AsFd for Local {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Runs a call until no signal interrupts it.
fn retry(mut call: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        match call() {
            Ok(n) => return Ok(n),
            Err(VolatileMemoryError::IOError(e)) if e.kind() == ErrorKind::Interrupted => {}
            Err(VolatileMemoryError::IOError(e)) => return Err(e),
            Err(e) => return Err(io::Error::other(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const ALL: Readiness = Readiness { readable: true, writable: true, hangup: true };

    fn pair() -> (Local, UnixStream) {
        let (device, user) = UnixStream::pair().unwrap();
        device.set_nonblocking(true).unwrap();
        user.set_nonblocking(true).unwrap();
        let mut local = Local::new(device);
        local.ready(ALL);
        (local, user)
    }

    fn write(local: &mut Local, mut bytes: Vec<u8>) {
        local.write(&[VolatileSlice::from(&mut bytes[..])]);
    }

    fn read(local: &mut Local, room: usize) -> Vec<u8> {
        let mut bytes = vec![0; room];
        let n = local.read_into(&[VolatileSlice::from(&mut bytes[..])], room);
        bytes.truncate(n);
        bytes
    }

    #[test]
    fn reading_fills_several_slices_up_to_the_limit() {
        let (mut local, mut user) = pair();
        user.write_all(b"abcdef").unwrap();
        let (mut a, mut b) = ([0; 2], [0; 9]);
        let n = local.read_into(&[VolatileSlice::from(&mut a[..]), VolatileSlice::from(&mut b[..])], 5);
        assert_eq!((n, &a, &b[..3]), (5, b"ab", &b"cde"[..]));
        assert_eq!(read(&mut local, 9), b"f");
        assert!(local.readable());
        assert_eq!(read(&mut local, 9), b"");
        assert!(!local.readable() && !local.ended());
    }

    #[test]
    fn a_slow_reader_fills_the_backlog_and_gets_every_byte() {
        let (mut local, mut user) = pair();
        let mut total = 0;
        while local.held() == 0 {
            write(&mut local, vec![(total / 1000) as u8; 1000]);
            total += 1000;
        }
        assert!(!local.writable);
        local.finish_writing();
        let mut got = Vec::new();
        while got.len() < total {
            let mut buffer = [0; 4096];
            if let Ok(n) = user.read(&mut buffer) {
                got.extend_from_slice(&buffer[..n]);
            }
            local.ready(ALL);
        }
        assert_eq!((got.len(), local.held()), (total, 0));
        assert!(got.chunks(1000).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
        assert_eq!(user.read(&mut [0; 1]).unwrap(), 0, "end of file follows the backlog");
    }

    #[test]
    fn half_closes_are_told_apart_from_a_close() {
        let (mut local, mut user) = pair();
        user.write_all(b"x").unwrap();
        user.shutdown(Shutdown::Write).unwrap();
        local.ready(ALL);
        assert_eq!(read(&mut local, 9), b"x");
        assert!(!local.ended());
        assert_eq!(read(&mut local, 9), b"");
        assert!(local.ended() && !local.deaf());
        drop(user);
        local.ready(ALL);
        assert!(local.deaf());
    }

    #[test]
    fn what_was_written_before_a_close_is_still_read() {
        let (mut local, mut user) = pair();
        user.write_all(b"last words").unwrap();
        drop(user);
        local.ready(ALL);
        assert!(local.deaf() && !local.ended());
        assert_eq!(read(&mut local, 99), b"last words");
        assert_eq!(read(&mut local, 99), b"");
        assert!(local.ended());
    }

    #[test]
    fn a_user_that_closes_with_unread_bytes_is_gone() {
        let (mut local, user) = pair();
        write(&mut local, b"unread".to_vec());
        drop(user);
        assert_eq!(read(&mut local, 9), b"");
        assert!(local.ended() && local.deaf());
    }

    #[test]
    fn bytes_for_a_deaf_user_are_dropped_at_once() {
        let (mut local, user) = pair();
        user.shutdown(Shutdown::Read).unwrap();
        for _ in 0..2 {
            write(&mut local, vec![0; 5000]);
            assert!(local.deaf() && local.held() == 0);
        }
    }

    #[test]
    fn a_guest_that_takes_no_more_fails_the_users_writes() {
        let (mut local, mut user) = pair();
        local.stop_reading();
        assert_eq!(user.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
        assert!(local.ended() && !local.deaf());
    }
}
