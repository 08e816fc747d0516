//! A program for a container: the guest's end of vsock connections.
//!
//! ```text
//!   vsock-peer echo PORT     listens, prints "listening", sends back what each connection brings until its end
//!   vsock-peer dial PORT     connects to the host, prints "connected" or the error's name
//!   vsock-peer pour PORT     listens, and writes to each connection until it breaks; prints "broken" then
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::thread;

use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, VsockAddr, accept, bind, connect, listen, shutdown,
    socket,
};

const HOST: u32 = 2;
const BLOCK: usize = 64 * 1024;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let port = args.get(1).and_then(|port| port.parse().ok());
    match (args.first().map(String::as_str), port) {
        (Some("echo"), Some(port)) => serve(port, echo),
        (Some("pour"), Some(port)) => serve(port, pour),
        (Some("dial"), Some(port)) => dial(port),
        _ => {
            eprintln!("usage: vsock-peer echo|dial|pour PORT");
            return ExitCode::FAILURE;
        }
    }
    .map_or_else(
        |errno| {
            eprintln!("vsock-peer: {errno}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn stream() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

fn serve(port: u32, each: fn(File)) -> nix::Result<()> {
    let listener = stream()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port))?;
    listen(&listener, Backlog::new(256)?)?;
    println!("listening");
    loop {
        let connection = next(&listener)?;
        thread::spawn(move || each(connection));
    }
}

/// A file does for reading and writing a connected socket.
fn next(listener: &OwnedFd) -> nix::Result<File> {
    let fd = accept(listener.as_raw_fd())?;
    // SAFETY: accept(2) has just made this descriptor, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn dial(port: u32) -> nix::Result<()> {
    let socket = stream()?;
    match connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port)) {
        Ok(()) => println!("connected"),
        Err(errno) => println!("{errno:?}"),
    }
    Ok(())
}

fn echo(mut connection: File) {
    let mut buffer = vec![0; BLOCK];
    while let Ok(count @ 1..) = connection.read(&mut buffer) {
        if connection.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    // The other end sees the end of the stream after the last byte.
    let _ = shutdown(connection.as_raw_fd(), Shutdown::Write);
}

fn pour(mut connection: File) {
    let block = vec![0x55; BLOCK];
    while connection.write_all(&block).is_ok() {}
    println!("broken");
}
