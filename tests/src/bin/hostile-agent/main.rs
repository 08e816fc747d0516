//! A guest's PID 1 that means harm: it boots like the real agent, then misbehaves in one way.
//!
//! ```text
//!   main     loads the vsock modules, reads its mode, says READY
//!   raw      bytes where gRPC is expected: none, garbage, floods of HTTP/2 frames
//!   liar     gRPC that is well-formed and untrue, endless or huge
//! ```
//!
//! The mode is the text after the last `MODE=` in its own file: the test appends it to the executable.

mod liar;
mod raw;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use rustix::system::finit_module;
use vmctr_proto::ports;

const HOST: u32 = 2;

fn main() {
    let mode = mode();
    load_modules();
    match mode.as_str() {
        "never-ready" => rest(),
        "exits" => {
            say_ready();
        }
        "prints" => print_without_end(),
        "dials" => dial_without_end(),
        name => match raw::Misbehaviour::named(name) {
            Some(misbehaviour) => raw::serve(misbehaviour),
            None => liar::serve(name),
        },
    }
}

fn mode() -> String {
    let own = fs::read("/init").expect("the initramfs holds it");
    let start = own.windows(5).rposition(|window| window == b"MODE=").expect("the test appends it") + 5;
    String::from_utf8_lossy(&own[start..]).trim().to_owned()
}

fn load_modules() {
    for name in fs::read_to_string("/modules/order").expect("the builder writes it").lines() {
        let module = File::open(format!("/modules/{name}.ko")).expect("listed modules are there");
        // One that is built in or loaded already is no loss.
        let _ = finit_module(&module, c"", 0);
    }
}

fn dial(port: u32) -> nix::Result<OwnedFd> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    Ok(stream)
}

/// What the real agent does when it serves.
fn say_ready() {
    drop(dial(ports::READY));
}

fn rest() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Lines on the console, some without an end.
fn print_without_end() {
    let mut console = File::options().write(true).open("/dev/console").expect("the kernel makes it");
    let line = [b'x'; 4096];
    for number in 0_u64.. {
        let _ = console.write_all(&line);
        if number.is_multiple_of(64) {
            let _ = console.write_all(b"\n\x1b[2J\0\xff\n");
        }
    }
}

/// Connections to every port of the host, kept open as long as they can be.
fn dial_without_end() {
    say_ready();
    let mut open = Vec::new();
    for port in (0..u32::MAX).cycle() {
        open.extend(dial([ports::READY, port][usize::from(port.is_multiple_of(2))]));
        if open.len() > 4096 {
            open.clear();
        }
    }
}
