//! A process's ends of its standard streams, and the threads that serve the other ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Gid, Uid, fchown};
use rustix::pipe::{PipeFlags, pipe_with};

use super::copy;

/// What the host connected: stdin, stdout, stderr.
pub type HostEnds = [Option<OwnedFd>; 3];
/// What the process gets as descriptors 0, 1 and 2.
pub type ProcessEnds = [OwnedFd; 3];

/// Makes pipes for the streams that the host connected, /dev/null for the others, and starts copying.
/// The pipes belong to the process's user, who may then open /dev/stdout again.
pub fn connect_pipes(host: HostEnds, user: u32) -> io::Result<ProcessEnds> {
    let [stdin, stdout, stderr] = host;
    Ok([input(stdin, user)?, output(stdout, user)?, output(stderr, user)?])
}

/// /dev/null three times, for a process whose streams will be a terminal.
pub fn no_streams() -> io::Result<ProcessEnds> {
    Ok([null()?, null()?, null()?])
}

/// Serves the host's streams from a pseudo-terminal's master.
pub fn connect_terminal(host: HostEnds, master: &OwnedFd) -> io::Result<()> {
    let [stdin, stdout, _] = host;
    // Without a stream the output goes nowhere; unread it would block the process.
    copy::output(master.try_clone()?, stdout.map_or_else(null, Ok)?)?;
    if let Some(stream) = stdin {
        copy::input(stream, master.try_clone()?)?;
    }
    Ok(())
}

fn null() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open("/dev/null")?.into())
}

fn input(stream: Option<OwnedFd>, user: u32) -> io::Result<OwnedFd> {
    let Some(stream) = stream else { return null() };
    let (reader, writer) = pipe(user)?;
    copy::input(stream, writer)?;
    Ok(reader)
}

fn output(stream: Option<OwnedFd>, user: u32) -> io::Result<OwnedFd> {
    let Some(stream) = stream else { return null() };
    let (reader, writer) = pipe(user)?;
    copy::output(reader, stream)?;
    Ok(writer)
}

fn pipe(user: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // Both ends are one file.
    fchown(&writer, Some(Uid::from_raw(user)), None::<Gid>)?;
    Ok((reader, writer))
}
