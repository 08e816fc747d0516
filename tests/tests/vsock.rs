//! vsock between host and guest: the unix socket in the run directory, and what flows through it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use vmctr_tests::rig::command::eventually;
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::vm::Vm;
use vmctr_tests::rig::{Rig, proc, stream};

const PORT: u32 = 5000;
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(30);

/// A container whose first process is the peer.
fn peer<'rig>(rig: &'rig Rig, mode: &str) -> Container<'rig> {
    let root = rig.busybox_root("peer", &[("bin/vsock-peer", Path::new(env!("CARGO_BIN_EXE_vsock-peer")))]);
    let script = format!("vsock-peer {mode} {PORT} > /out 2>&1");
    let container = rig.container_in(&root, "peer").flag("--env", "PATH=/bin").sh(&script).detached();
    eventually("the peer listens", SOON, || container.sh("grep -q listening /out").code() == 0);
    container
}

/// The socket of the only VM.
fn socket(rig: &Rig) -> PathBuf {
    let folders = fs::read_dir(rig.run_dir()).expect("readable").flatten().map(|entry| entry.path());
    let sockets: Vec<_> =
        folders.map(|folder| folder.join("vsock.sock")).filter(|path| path.exists()).collect();
    assert_eq!(sockets.len(), 1, "one VM runs: {sockets:?}");
    sockets[0].clone()
}

/// Connects to a port of the guest; none when that is refused.
fn connect(socket: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).expect("the shim listens");
    stream.set_read_timeout(Some(SOON)).expect("a time limit");
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).expect("the shim reads");
    let answer = line(&mut stream)?;
    assert!(answer.strip_prefix("OK ").is_some_and(|port| port.parse::<u32>().is_ok()), "answer {answer:?}");
    Some(stream)
}

/// A line, byte by byte so that nothing after it is taken; none at the stream's end.
fn line(stream: &mut UnixStream) -> Option<String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while stream.read(&mut byte).is_ok_and(|count| count == 1) {
        if byte[0] == b'\n' {
            return String::from_utf8(line).ok();
        }
        line.push(byte[0]);
    }
    None
}

/// Sends so much and takes back what comes, at once.
fn there_and_back(connection: UnixStream, bytes: u64, seed: u64) -> (stream::Seen, stream::Seen) {
    let mut writer = connection.try_clone().expect("enough file descriptors");
    let sender = thread::spawn(move || {
        let sent = stream::send(&mut writer, bytes, seed).expect("the guest reads");
        writer.shutdown(Shutdown::Write).expect("still open");
        sent
    });
    let mut reader = connection;
    let received = stream::receive(&mut reader).expect("the guest writes");
    (sender.join().expect("the sender does not panic"), received)
}

#[test]
fn a_gibibyte_each_way_on_eight_connections_arrives_intact() {
    let rig = Rig::vmctr();
    let container = peer(&rig, "echo");
    let socket = socket(&rig);
    let connections: Vec<_> = (0..8).map(|_| connect(&socket, PORT).expect("the peer listens")).collect();
    let busy = connections.into_iter().zip(1..).map(|(connection, seed)| {
        connection.set_read_timeout(Some(Duration::from_secs(120))).expect("a time limit");
        thread::spawn(move || there_and_back(connection, 128 * MIB, seed))
    });
    for streams in busy.collect::<Vec<_>>() {
        let (sent, received) = streams.join().expect("no thread panics");
        assert_eq!(received, sent);
    }
    container.remove();
}

#[test]
fn hundreds_of_connections_can_be_open_at_once() {
    let rig = Rig::vmctr();
    let container = peer(&rig, "echo");
    let socket = socket(&rig);
    let mut open: Vec<_> = (0..200).map(|_| connect(&socket, PORT).expect("the peer listens")).collect();
    for (number, connection) in open.iter_mut().enumerate() {
        connection.write_all(format!("{number}\n").as_bytes()).expect("the guest reads");
    }
    for (number, connection) in open.iter_mut().enumerate() {
        assert_eq!(line(connection), Some(number.to_string()));
    }
    container.remove();
}

#[test]
fn a_port_without_listener_and_a_bad_request_are_refused() {
    let rig = Rig::vmctr();
    let container = peer(&rig, "echo");
    let socket = socket(&rig);
    assert!(connect(&socket, PORT + 1).is_none(), "nobody listens there");
    for request in ["CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "GET / HTTP/1.1\n", "\n"] {
        let mut stream = UnixStream::connect(&socket).expect("the shim listens");
        stream.set_read_timeout(Some(SOON)).expect("a time limit");
        stream.write_all(request.as_bytes()).expect("the shim reads");
        assert!(!line(&mut stream).is_some_and(|answer| answer.starts_with("OK")), "{request:?} was taken");
    }
    let mut endless = UnixStream::connect(&socket).expect("the shim listens");
    endless.set_write_timeout(Some(SOON)).expect("a time limit");
    let broken =
        (0..16384).find_map(|_| endless.write_all(&[b'x'; 1024]).err()).expect("16 MiB are no request");
    assert!(matches!(broken.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{broken}");
    assert!(connect(&socket, PORT).is_some(), "the next one is served");
    container.remove();
}

#[test]
fn a_container_cannot_connect_to_the_host() {
    let rig = Rig::vmctr();
    let container = peer(&rig, "echo");
    // Every port that anything here uses, and one that nothing does.
    for port in [1024, 1025, 1026, 22, 5000] {
        let output = container.exec("dial", &[], &["/bin/vsock-peer", "dial", &port.to_string()]).ok();
        assert_ne!(output.text().trim(), "connected", "to port {port}");
    }
    container.remove();
}

#[test]
fn a_host_that_hangs_up_stops_a_guest_that_pours() {
    let rig = Rig::vmctr();
    let container = peer(&rig, "pour");
    let socket = socket(&rig);
    let mut connection = connect(&socket, PORT).expect("the peer listens");
    connection.read_exact(&mut vec![0; 1 << 20]).expect("the guest pours");
    drop(connection);
    eventually("the guest sees it", SOON, || container.sh("grep -q broken /out").code() == 0);
    container.remove();
}

#[test]
fn a_guest_that_pours_is_held_back_by_a_host_that_does_not_read() {
    let rig = Rig::vmctr();
    let container = peer(&rig, "pour");
    let shim = Vm::of(&rig, container.id()).shim;
    let socket = socket(&rig);
    let before = proc::rollup(shim, "Private_Dirty:").expect("the shim runs");
    let idle: Vec<_> = (0..8).map(|_| connect(&socket, PORT).expect("the peer listens")).collect();
    thread::sleep(Duration::from_secs(10));
    let grown = proc::rollup(shim, "Private_Dirty:").expect("the shim runs").saturating_sub(before);
    assert!(grown < 32 * MIB, "the shim has grown by {} MiB", grown / MIB);
    container.sh("echo still here").ok().prints("still here");
    drop(idle);
    container.remove();
}

#[test]
fn connections_end_with_the_container() {
    let rig = Rig::vmctr();
    let container = peer(&rig, "echo");
    let mut connection = connect(&socket(&rig), PORT).expect("the peer listens");
    container.kill("SIGKILL").ok();
    assert_eq!(connection.read(&mut [0; 16]).unwrap_or_default(), 0, "the stream ends");
    container.remove();
}
