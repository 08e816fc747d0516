//! What can fail for the users of the device.

use std::io;

/// The device cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// epoll, eventfd or timerfd.
    #[error("Cannot create the vsock device's event descriptors (is the limit of open files reached?)")]
    Events(#[source] io::Error),
    /// The vhost-user back-end library refused.
    #[error("Cannot create the vsock device's vhost-user back-end: {0}")]
    Backend(String),
    /// No thread.
    #[error("Cannot start the vsock device's thread")]
    Thread(#[source] io::Error),
}

/// A connect to the guest failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there in the guest, or it closed at once.
    #[error("The guest refused the connection to vsock port {0}")]
    Refused(u32),
    /// The VM has ended, or its driver was reset while the connect was under way.
    #[error("The VM's vsock device went away before the connection to port {0} was made")]
    Gone(u32),
    /// The table of connections is full.
    #[error("The VM has as many vsock connections as it may have ({0}); close some first")]
    Full(usize),
    /// No socket pair on the host.
    #[error("Cannot create the host's end of a vsock connection (is the limit of open files reached?)")]
    Socket(#[source] io::Error),
}

impl From<ConnectError> for io::Error {
    fn from(e: ConnectError) -> Self {
        let kind = match &e {
            ConnectError::Refused(_) => io::ErrorKind::ConnectionRefused,
            ConnectError::Gone(_) => io::ErrorKind::NotConnected,
            ConnectError::Full(_) => io::ErrorKind::QuotaExceeded,
            ConnectError::Socket(source) => source.kind(),
        };
        Self::new(kind, e)
    }
}

/// A host port cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// There is a listener already.
    #[error("vsock port {0} of the host has a listener already")]
    InUse(u32),
    /// The VM has ended.
    #[error("The VM's vsock device is gone")]
    Gone,
}

/// A listener gives no connection.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The VM has ended.
    #[error("The VM's vsock device is gone")]
    Gone,
    /// The stream cannot be used by the runtime.
    #[error("Cannot register a vsock stream with the runtime")]
    Socket(#[source] io::Error),
}
