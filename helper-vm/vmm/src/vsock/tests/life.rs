//! The handle's life with and without QEMU, and the clients of the per-VM socket.

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream as StdStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use vmctr_proto::GuestCid;

use crate::vsock::{AcceptError, ConnectError, ListenError, VsockHost};

const SOON: Duration = Duration::from_secs(10);

struct Device {
    dir: TempDir,
    host: VsockHost,
}

impl Device {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vhost")).unwrap();
        let host = VsockHost::spawn(GuestCid::DEFAULT, listener).unwrap();
        Self { dir, host }
    }

    fn vhost(&self) -> PathBuf {
        self.dir.path().join("vhost")
    }
}

#[tokio::test]
async fn a_connect_waits_for_the_guest_and_can_be_given_up() {
    let device = Device::new();
    timeout(Duration::from_millis(50), device.host.connect(1)).await.unwrap_err();
}

#[tokio::test]
async fn everything_pending_fails_when_qemu_goes_away() {
    let device = Device::new();
    let mut listener = device.host.listen(7).unwrap();
    let host = device.host.clone();
    let connect = tokio::spawn(async move { host.connect(1).await });
    let qemu = StdStream::connect(device.vhost()).unwrap();
    sleep(Duration::from_millis(50)).await;
    assert!(!connect.is_finished());
    drop(qemu);
    let connect = timeout(SOON, connect).await.unwrap().unwrap();
    assert!(matches!(connect, Err(ConnectError::Gone(1))));
    let accept = timeout(SOON, listener.accept()).await.unwrap();
    assert!(matches!(accept, Err(AcceptError::Gone)));
    assert!(matches!(device.host.connect(2).await, Err(ConnectError::Gone(2))));
    assert!(matches!(device.host.listen(8), Err(ListenError::Gone)));
}

#[tokio::test]
async fn nonsense_from_qemu_ends_the_device() {
    let device = Device::new();
    let mut qemu = UnixStream::connect(device.vhost()).await.unwrap();
    qemu.write_all(&[0xff; 64]).await.unwrap();
    assert!(matches!(timeout(SOON, device.host.connect(1)).await.unwrap(), Err(ConnectError::Gone(1))));
}

#[tokio::test]
async fn a_device_that_nobody_needs_ends_without_qemu() {
    let device = Device::new();
    let path = device.vhost();
    let Device { dir: _dir, host } = device;
    drop(host);
    for _ in 0..1000 {
        if StdStream::connect(&path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused) {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the device still listens");
}

#[tokio::test]
async fn clients_with_bad_lines_are_closed() {
    let device = Device::new();
    let path = device.dir.path().join("vsock.sock");
    let server = device.host.serve_unix(&path).unwrap();
    let endless = [b'1'; 100];
    for line in [&b"HELLO\n"[..], b"CONNECT x\n", b"\n", &endless] {
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(line).await.unwrap();
        // ECONNRESET instead of the end of file: the client sent more than was read.
        let read = timeout(SOON, client.read_to_end(&mut Vec::new())).await.unwrap();
        assert!(read.is_err() || read.is_ok_and(|n| n == 0), "{line:?}");
    }
    drop(server);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_client_is_closed_when_the_vm_ends() {
    let device = Device::new();
    let path = device.dir.path().join("vsock.sock");
    let _server = device.host.serve_unix(&path).unwrap();
    let mut client = UnixStream::connect(&path).await.unwrap();
    client.write_all(b"CONNECT 5\n").await.unwrap();
    drop(UnixStream::connect(device.vhost()).await.unwrap());
    assert_eq!(timeout(SOON, client.read_to_end(&mut Vec::new())).await.unwrap().unwrap(), 0);
}
