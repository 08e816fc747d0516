//! The per-VM unix socket: any program on the host reaches a port in the guest through it.
//!
//! ```text
//!   client                               here
//!   CONNECT <port>\n  ───────────────>
//!                     <───────────────  OK <host port>\n        or the connection is closed
//!                     <── raw bytes ──>
//! ```
//!
//! After the first line the client's socket itself becomes the host's end of the connection: no byte of
//! data passes through this module. The line is read byte by byte so that nothing behind it is taken.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::host::VsockHost;

/// `CONNECT 4294967295\n`, with a little room.
const MAX_LINE: usize = 32;

/// How long a client may take to send its line.
const LINE_TIME: Duration = Duration::from_secs(10);

/// Pause after an accept that failed (no descriptors left).
const RETRY: Duration = Duration::from_millis(100);

/// Serves the socket until it is dropped; then the socket file is gone too.
#[derive(Debug)]
pub struct UnixServer {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl UnixServer {
    pub(super) fn bind(host: VsockHost, path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(Self { path: path.to_owned(), task: tokio::spawn(accept_all(host, listener)) })
    }
}

impl Drop for UnixServer {
    fn drop(&mut self) {
        self.task.abort();
        // Gone already when the whole run directory is.
        let _ = fs::remove_file(&self.path);
    }
}

async fn accept_all(host: VsockHost, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(serve(host.clone(), client));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the VM's vsock socket");
                sleep(RETRY).await;
            }
        }
    }
}

async fn serve(host: VsockHost, mut client: UnixStream) {
    let Ok(Some(port)) = timeout(LINE_TIME, read_request(&mut client)).await else { return };
    // tokio's streams are nonblocking, and stay so.
    let Ok(client) = client.into_std() else { return };
    if let Err(error) = host.open(port, client, true).await {
        tracing::debug!(%error, "a client of the VM's vsock socket got no connection");
    }
}

/// The port of a `CONNECT` line; None for anything else.
async fn read_request(client: &mut UnixStream) -> Option<u32> {
    let mut line = Vec::with_capacity(MAX_LINE);
    while line.len() < MAX_LINE {
        match client.read_u8().await.ok()? {
            b'\n' => return parse(&line),
            byte => line.push(byte),
        }
    }
    None
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_connect_line_with_a_port_is_a_request() {
        assert_eq!(parse(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse(b"CONNECT 4294967295"), Some(u32::MAX));
        for bad in ["", "CONNECT", "CONNECT ", "CONNECT +1", "CONNECT 4294967296", "connect 1", "CONNECT 1 "]
        {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(parse(b"CONNECT \xff"), None);
    }
}
