//! Accepts stdio streams and reads their numbers.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::io::AsyncReadExt;
use tokio::sync::Semaphore;
use tokio_vsock::{VsockListener, VsockStream};

use crate::boot::console;
use crate::guest::Handle;

/// Streams whose number is awaited at a time.
const MAX_UNNUMBERED: usize = 64;
/// How long the host has to send the number.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// Pause after a failed accept, so that running out of files does not spin.
const RETRY: Duration = Duration::from_millis(100);

/// Accepts streams for as long as the guest runs.
pub async fn accept(listener: VsockListener, guest: Handle) {
    let places = Arc::new(Semaphore::new(MAX_UNNUMBERED));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let guest = guest.clone();
                tokio::spawn(async move {
                    introduce(stream, &guest).await;
                    drop(place);
                });
            }
            Err(error) => {
                console::warn(&format!("accepting a stdio stream: {error}"));
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn introduce(mut stream: VsockStream, guest: &Handle) {
    let outcome = match tokio::time::timeout(HEADER_TIME, stream.read_u64_le()).await {
        Ok(Ok(number)) => blocking(&stream).map(|stream| (number, stream)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(std::io::ErrorKind::TimedOut.into()),
    };
    match outcome {
        Ok((number, stream)) => {
            guest.call(move |guest| guest.streams.offer(number, stream, std::time::Instant::now())).await;
        }
        Err(error) => console::warn(&format!("a stdio stream sent no number: {error}")),
    }
}

/// The connection as a plain blocking descriptor, for a copying thread.
fn blocking(stream: &VsockStream) -> std::io::Result<OwnedFd> {
    let fd = stream.as_fd().try_clone_to_owned()?;
    fcntl_setfl(&fd, fcntl_getfl(&fd)? - OFlags::NONBLOCK)?;
    Ok(fd)
}
