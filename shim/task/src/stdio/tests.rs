//! Copies between real FIFOs, files and programs on one side and a socket pair as the guest on the other.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;

const QUIET: Duration = Duration::from_millis(300);

struct Rig {
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

/// The shim's end and the guest's.
fn pair() -> (Option<UnixStream>, UnixStream) {
    let (shim, guest) = UnixStream::pair().unwrap();
    (Some(shim), guest)
}

fn start(names: &Names, streams: Streams) -> ProcessIo {
    open(names, "c1", "ns").unwrap().start(streams).unwrap()
}

#[tokio::test]
async fn output_arrives_whole_and_ends_with_the_stream() {
    let rig = Rig::new();
    let stdout = rig.fifo("out");
    let (shim, mut guest) = pair();
    let io = start(
        &Names { stdout: stdout.clone(), ..Names::default() },
        Streams { stdout: shim, ..Streams::default() },
    );
    let reader = thread::spawn(move || fs::read(stdout).unwrap());
    let data: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    guest.write_all(&data).unwrap();
    drop(guest);
    io.outputs().drain(QUIET).await;
    assert!(reader.join().unwrap() == data);
}

#[tokio::test]
async fn a_start_can_wait_for_the_reader() {
    let rig = Rig::new();
    let stdout = rig.fifo("out");
    let (shim, _guest) = pair();
    let io = start(
        &Names { stdout: stdout.clone(), ..Names::default() },
        Streams { stdout: shim, ..Streams::default() },
    );
    assert!(timeout(QUIET, io.outputs().opened(Duration::MAX)).await.is_err(), "nobody reads");
    io.outputs().opened(QUIET).await;
    let _reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&stdout).unwrap();
    timeout(Duration::from_secs(5), io.outputs().opened(Duration::MAX)).await.unwrap();
}

#[tokio::test]
async fn a_client_may_go_and_another_come() {
    let rig = Rig::new();
    let stdout = rig.fifo("out");
    let (shim, mut guest) = pair();
    let _io = start(
        &Names { stdout: stdout.clone(), ..Names::default() },
        Streams { stdout: shim, ..Streams::default() },
    );
    let mut buffer = [0; 3];
    let mut first = File::open(&stdout).unwrap();
    guest.write_all(b"one").unwrap();
    first.read_exact(&mut buffer).unwrap();
    drop(first);
    guest.write_all(b"two").unwrap();
    let mut second = File::open(&stdout).unwrap();
    second.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"two");
}

#[tokio::test]
async fn input_ends_after_close_io_and_not_before() {
    let rig = Rig::new();
    let stdin = rig.fifo("in");
    let (shim, mut guest) = pair();
    let mut io = start(
        &Names { stdin: stdin.clone(), ..Names::default() },
        Streams { stdin: shim, ..Streams::default() },
    );
    let client = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&stdin);
    assert!(client.is_err(), "the input began before the process");
    io.open_stdin().unwrap();
    fs::write(&stdin, "hello").unwrap();
    let mut buffer = [0; 5];
    guest.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
    guest.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(guest.read(&mut buffer).is_err(), "the input ended although a client may come back");
    guest.set_read_timeout(None).unwrap();
    io.close_stdin();
    assert_eq!(guest.read(&mut buffer).unwrap(), 0);
}

#[tokio::test]
async fn close_io_before_the_start_is_remembered() {
    let rig = Rig::new();
    let stdin = rig.fifo("in");
    let (shim, mut guest) = pair();
    let mut io = start(&Names { stdin, ..Names::default() }, Streams { stdin: shim, ..Streams::default() });
    io.close_stdin();
    io.open_stdin().unwrap();
    assert_eq!(guest.read(&mut [0]).unwrap(), 0);
}

#[tokio::test]
async fn the_input_thread_ends_with_the_process() {
    let rig = Rig::new();
    let stdin = rig.fifo("in");
    let (shim, guest) = pair();
    let mut io = start(
        &Names { stdin: stdin.clone(), ..Names::default() },
        Streams { stdin: shim, ..Streams::default() },
    );
    io.open_stdin().unwrap();
    let mut client = OpenOptions::new().write(true).open(&stdin).unwrap();
    guest.shutdown(Shutdown::Both).unwrap();
    drop(guest);
    let begun = Instant::now();
    while client.write_all(b"x").is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(5), "the FIFO is still read");
        thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn unread_output_holds_up_the_drain_for_the_limit_only() {
    let rig = Rig::new();
    let stdout = rig.fifo("out");
    let (shim, guest) = pair();
    let io = start(&Names { stdout, ..Names::default() }, Streams { stdout: shim, ..Streams::default() });
    drop(guest);
    let begun = Instant::now();
    io.outputs().drain(QUIET).await;
    assert!(begun.elapsed() >= QUIET && begun.elapsed() < QUIET * 10);
    let mut open = io.outputs().open;
    drop(io);
    // Called off, the thread that waits for a reader ends.
    timeout(Duration::from_secs(5), open.wait_for(|open| *open == 0)).await.unwrap().unwrap();
}

#[tokio::test]
async fn log_files_are_made_and_shared_by_both_outputs() {
    let rig = Rig::new();
    let path = rig.path("logs/c1.log");
    let name = format!("file://{}", path.display());
    let (out, mut guest_out) = pair();
    let (err, mut guest_err) = pair();
    let io = start(
        &Names { stdout: name.clone(), stderr: name, ..Names::default() },
        Streams { stdout: out, stderr: err, ..Streams::default() },
    );
    guest_out.write_all(b"out\n").unwrap();
    guest_err.write_all(b"err\n").unwrap();
    drop((guest_out, guest_err));
    io.outputs().drain(QUIET).await;
    let text = fs::read_to_string(path).unwrap();
    assert!(text == "out\nerr\n" || text == "err\nout\n", "{text}");
}

#[tokio::test]
async fn a_logging_program_gets_both_outputs_its_arguments_and_the_container() {
    let rig = Rig::new();
    let program = rig.path("logger");
    let script = "#!/bin/sh\nexec 5>&-\n/bin/cat <&3 >\"$2.out\"\n/bin/cat <&4 >\"$2.err\"\necho \"$1 $CONTAINER_ID $CONTAINER_NAMESPACE\" >\"$2.env\"\n";
    // By a process of its own: a program that this one wrote may still be open for writing in a child that another test
    // has just forked, and cannot be run then.
    let write = ["-c", "printf %s \"$0\" > \"$1\" && chmod 755 \"$1\"", script];
    let written = std::process::Command::new("sh").args(write).arg(&program).status().unwrap();
    assert!(written.success());
    let target = rig.path("log");
    let name = format!("binary://{}?key={}", program.display(), target.display());
    let (out, mut guest_out) = pair();
    let (err, mut guest_err) = pair();
    let io = start(
        &Names { stdout: name.clone(), stderr: name, ..Names::default() },
        Streams { stdout: out, stderr: err, ..Streams::default() },
    );
    guest_out.write_all(b"out").unwrap();
    guest_err.write_all(b"err").unwrap();
    drop((guest_out, guest_err));
    io.outputs().drain(Duration::from_secs(10)).await;
    let read = |suffix: &str| fs::read_to_string(rig.path(&format!("log.{suffix}"))).unwrap();
    assert_eq!((read("out").as_str(), read("err").as_str()), ("out", "err"));
    assert_eq!(read("env"), "key c1 ns\n");
}

#[test]
fn what_is_not_there_is_named() {
    for (names, want) in [
        (Names { stdout: "/nonexistent/out".into(), ..Names::default() }, "/nonexistent/out"),
        (Names { stdin: "/nonexistent/in".into(), ..Names::default() }, "/nonexistent/in"),
        (Names { stdout: "binary:///nonexistent/logger".into(), ..Names::default() }, "/nonexistent/logger"),
        (Names { stdin: "file:///x".into(), ..Names::default() }, "file:///x"),
    ] {
        let text = open(&names, "c1", "ns").unwrap_err().to_string();
        assert!(text.contains(want), "{text}");
    }
}
