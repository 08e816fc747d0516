//! Host ports that the guest may connect to.
//!
//! The device thread delivers a connected stream the moment the guest's REQUEST arrives; the listener's
//! queue holds [`BACKLOG`] streams that nobody has accepted, further guests' requests are refused.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::error::{AcceptError, ListenError};

/// Connections of a listener that wait for [`Listener::accept`].
const BACKLOG: usize = 64;

/// All listeners of a device.
#[derive(Debug, Default)]
pub(super) struct Listeners(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    by_port: HashMap<u32, Sender<UnixStream>>,
    closed: bool,
}

impl Listeners {
    pub(super) fn listen(self: &Arc<Self>, port: u32) -> Result<Listener, ListenError> {
        let mut state = self.lock();
        if state.closed {
            return Err(ListenError::Gone);
        }
        if state.by_port.contains_key(&port) {
            return Err(ListenError::InUse(port));
        }
        let (sender, streams) = channel(BACKLOG);
        state.by_port.insert(port, sender);
        Ok(Listener { port, streams, listeners: Arc::clone(self) })
    }

    /// Hands a stream to the port's listener; false when there is none or its queue is full.
    pub(super) fn deliver(&self, port: u32, stream: UnixStream) -> bool {
        self.lock().by_port.get(&port).is_some_and(|sender| sender.try_send(stream).is_ok())
    }

    /// The device is gone: pending and later accepts fail.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.by_port.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the guest's connections to one host port. Dropping it refuses further ones.
#[derive(Debug)]
pub struct Listener {
    port: u32,
    streams: Receiver<UnixStream>,
    listeners: Arc<Listeners>,
}

impl Listener {
    /// Waits for the next connection.
    pub async fn accept(&mut self) -> Result<tokio::net::UnixStream, AcceptError> {
        let stream = self.streams.recv().await.ok_or(AcceptError::Gone)?;
        tokio::net::UnixStream::from_std(stream).map_err(AcceptError::Socket)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.listeners.lock().by_port.remove(&self.port);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> UnixStream {
        super::super::mux::nonblocking_pair().unwrap().0
    }

    #[tokio::test]
    async fn a_listener_gets_what_is_delivered_to_its_port_while_it_lives() {
        let listeners = Arc::new(Listeners::default());
        let mut listener = listeners.listen(9).unwrap();
        assert!(!listeners.deliver(8, stream()));
        assert!(listeners.deliver(9, stream()));
        listener.accept().await.unwrap();
        drop(listener);
        assert!(!listeners.deliver(9, stream()));
        listeners.listen(9).unwrap();
    }

    #[tokio::test]
    async fn the_queue_is_bounded() {
        let listeners = Arc::new(Listeners::default());
        let mut listener = listeners.listen(9).unwrap();
        for _ in 0..BACKLOG {
            assert!(listeners.deliver(9, stream()));
        }
        assert!(!listeners.deliver(9, stream()));
        listener.accept().await.unwrap();
        assert!(listeners.deliver(9, stream()));
    }

    #[tokio::test]
    async fn a_port_has_one_listener_and_a_closed_device_none() {
        let listeners = Arc::new(Listeners::default());
        let mut listener = listeners.listen(9).unwrap();
        assert!(matches!(listeners.listen(9), Err(ListenError::InUse(9))));
        listeners.close();
        assert!(matches!(listener.accept().await, Err(AcceptError::Gone)));
        assert!(matches!(listeners.listen(9), Err(ListenError::Gone)));
    }
}
