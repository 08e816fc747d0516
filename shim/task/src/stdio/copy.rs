//! The two directions of copying, each on a thread of its own with one buffer.
//!
//! ```text
//!   input   FIFO (read end; we hold a write end until CloseIO) --> guest stream, half-closed at the end
//!   output  guest stream --> FIFO (write end; we hold a read end) | log file | pipe to the logging program
//! ```
//!
//! We hold the FIFO's other end ourselves so that containerd and its clients may come and go: without it a
//! write would fail, or a read would see an end, the moment the last of them is away.
//! An output whose target fails is read on and thrown away: a full disk of logs does not stop a container.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tracing::warn;

use super::wait::{Cancel, Woken};

const BUFFER: usize = 64 * 1024;

/// Between two tries to open a FIFO that has no reader yet.
const READER_CHECK: Duration = Duration::from_millis(20);

/// Where output goes.
#[derive(Debug)]
pub enum Sink {
    /// Opened by the thread: a FIFO's opening waits for its reader.
    Path(PathBuf),
    /// A log file, or the pipe to the logging program.
    Open(File),
}

/// The guest's end, ready for [`output`] and [`input`].
pub fn prepare(stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(true)
}

/// Copies what the guest writes until it closes; counts the bytes that arrived in `progress`. Calls `opened` when it
/// has a target, or will have none.
pub fn output(
    mut from: &UnixStream,
    sink: Sink,
    cancel: &Cancel,
    progress: &AtomicU64,
    opened: impl FnOnce(),
) -> io::Result<()> {
    let mut target = match open_sink(sink, cancel) {
        Ok(None) => return Ok(()),
        Ok(Some(target)) => Some(target),
        Err(error) => {
            warn!("Output is thrown away: cannot open its target: {error}");
            None
        }
    };
    opened();
    let mut buffer = vec![0; BUFFER];
    while let Some(count) = read_some(&mut from, &mut buffer, cancel)? {
        if let Some(open) = &target
            && let Err(error) = write_all(&open.write, &buffer[..count], cancel)
        {
            warn!("Output is thrown away from here on: {error}");
            target = None;
        }
        progress.fetch_add(count as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Copies what containerd writes until it closes, then closes the process's input.
pub fn input(fifo: &File, to: &UnixStream, cancel: &Cancel) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        // Asking for no event of the stream leaves its hang-up: the process is gone.
        if cancel.wait(&[(fifo, PollFlags::IN), (to, PollFlags::empty())], None)? == Woken::Cancelled {
            return Ok(());
        }
        match (&mut &*fifo).read(&mut buffer) {
            Ok(0) => return to.shutdown(Shutdown::Write),
            Ok(count) => write_all(to, &buffer[..count], cancel)?,
            Err(error) if is_retry(&error) && hung_up(to)? => return Ok(()),
            Err(error) if is_retry(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Opens the read end of containerd's FIFO and a write end to hold until CloseIO. Never waits.
pub fn open_input(path: &Path) -> io::Result<(File, Option<OwnedFd>)> {
    if !is_fifo(path)? {
        return Ok((File::open(path)?, None));
    }
    let reader = open(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
    let keep = open(path, OFlags::WRONLY | OFlags::NONBLOCK)?;
    Ok((reader.into(), Some(keep)))
}

struct Target {
    write: File,
    /// Keeps the FIFO readable while no client is there.
    _keep: Option<OwnedFd>,
}

/// `None`: called off before a reader came.
fn open_sink(sink: Sink, cancel: &Cancel) -> io::Result<Option<Target>> {
    let path = match sink {
        Sink::Open(write) => return Ok(Some(Target { write, _keep: None })),
        Sink::Path(path) => path,
    };
    if !is_fifo(&path)? {
        let write = open(&path, OFlags::WRONLY | OFlags::APPEND)?.into();
        return Ok(Some(Target { write, _keep: None }));
    }
    loop {
        match open(&path, OFlags::WRONLY | OFlags::NONBLOCK) {
            Ok(write) => {
                let keep = open(&path, OFlags::RDONLY | OFlags::NONBLOCK)?;
                return Ok(Some(Target { write: write.into(), _keep: Some(keep) }));
            }
            Err(Errno::NXIO) if cancel.wait(&[], Some(READER_CHECK))? == Woken::Cancelled => return Ok(None),
            Err(Errno::NXIO) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
}

fn is_fifo(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    Ok(path.metadata()?.file_type().is_fifo())
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn hung_up(stream: &UnixStream) -> io::Result<bool> {
    let fd = rustix::event::PollFd::new(stream, PollFlags::empty());
    let mut fds = [fd];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default()))?;
    Ok(!fds[0].revents().is_empty())
}

/// `None` at the end of the stream or when called off.
fn read_some(from: &mut &UnixStream, buffer: &mut [u8], cancel: &Cancel) -> io::Result<Option<usize>> {
    loop {
        match from.read(buffer) {
            Ok(0) => return Ok(None),
            Ok(count) => return Ok(Some(count)),
            Err(error) if is_retry(&error) => {
                if cancel.wait(&[(*from, PollFlags::IN)], None)? == Woken::Cancelled {
                    return Ok(None);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn write_all<T: AsFd>(to: &T, mut bytes: &[u8], cancel: &Cancel) -> io::Result<()>
where
    for<'a> &'a T: Write,
{
    while !bytes.is_empty() {
        match (&mut &*to).write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if is_retry(&error) => {
                if cancel.wait(&[(to, PollFlags::OUT)], None)? == Woken::Cancelled {
                    return Err(io::Error::new(ErrorKind::TimedOut, "nobody reads it"));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
