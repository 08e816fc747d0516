//! A terminal to run a command on, and to type into.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use super::command::{POLL, TIME_LIMIT, eventually};

/// A command on a terminal of its own; ended when dropped.
pub struct Terminal {
    master: File,
    child: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts a command, with its environment, on a new terminal of this size (columns, rows).
    pub fn run(command: &mut Command, size: (u16, u16)) -> Self {
        let pty = nix::pty::openpty(None, None).expect("the host has pseudo terminals");
        let slave = || pty.slave.try_clone().expect("enough file descriptors");
        set_size(&pty.master, size);
        // `setsid --ctty` makes the terminal the command's controlling one, so that it gets SIGWINCH.
        let mut session = Command::new("setsid");
        session.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
        session.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let child = session.stdin(slave()).stdout(slave()).stderr(slave()).spawn().expect("setsid starts");
        let master = File::from(pty.master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        collect(master.try_clone().expect("enough file descriptors"), Arc::clone(&seen));
        Self { master, child, seen }
    }

    /// Changes the size (columns, rows); the command gets SIGWINCH.
    pub fn resize(&self, size: (u16, u16)) {
        set_size(&self.master, size);
    }

    /// Types.
    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("the terminal is open");
    }

    /// What has been printed so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().expect("no holder panics")).into_owned()
    }

    /// Waits until this has been printed.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + TIME_LIMIT;
        while !self.screen().contains(text) {
            let over = Instant::now() > deadline || self.has_ended();
            assert!(!over || self.screen().contains(text), "{text:?} is not shown:\n{}", self.screen());
            thread::sleep(POLL);
        }
    }

    /// The command's last words may still be on their way when it ends.
    fn has_ended(&mut self) -> bool {
        let ended = self.child.try_wait().expect("the child is ours").is_some();
        if ended {
            thread::sleep(POLL * 10);
        }
        ended
    }

    /// Waits for the command's end; returns its exit code.
    pub fn finish(mut self) -> i32 {
        let mut code = None;
        eventually("the command on the terminal ends", TIME_LIMIT, || {
            code = self.child.try_wait().expect("the child is ours").and_then(|status| status.code());
            code.is_some()
        });
        code.expect("just seen")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // An error means that it has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut master: File, seen: Arc<Mutex<Vec<u8>>>) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        // EIO when the last holder of the other end is gone.
        while let Ok(count @ 1..) = master.read(&mut buffer) {
            seen.lock().expect("no holder panics").extend_from_slice(&buffer[..count]);
        }
    });
}

fn set_size(terminal: &impl AsFd, (columns, rows): (u16, u16)) {
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size).expect("it is a terminal");
}
