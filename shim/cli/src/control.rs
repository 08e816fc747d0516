//! Client of a shim's control socket. Every wait has a limit.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use vmctr_proto::control::control_client::ControlClient;
use vmctr_proto::control::{
    ExportRequest, HoldReply, HoldRequest, InspectReply, InspectRequest, ReadMergedRequest, ReadUpperReply,
    ReadUpperRequest, ReleaseRequest,
};

/// How long a shim may take: it only looks at what it knows.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long the guest may take to open a container's root; the shim has a limit of its own.
const EXPORT_PATIENCE: Duration = Duration::from_secs(15);

/// How long freezing a container and writing its changes back may take; the shim has limits of its own.
const HOLD_PATIENCE: Duration = Duration::from_secs(90);

/// The shim does not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("The shim does not listen at {socket}")]
    Connect {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("The shim at {socket} does not speak gRPC")]
    Channel {
        socket: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("The shim at {socket} refused: {message}")]
    Refused { socket: PathBuf, message: String },
    #[error("The shim at {socket} did not answer within {} s", patience.as_secs())]
    Silent { socket: PathBuf, patience: Duration },
    #[error("The shim at {socket} has no container")]
    NotFound { socket: PathBuf },
    #[error("The container does not run: {message}")]
    NotRunning { message: String },
    #[error("The container's VM cannot serve its root: it was started by an earlier release")]
    NoExports,
    #[error("The shim at {socket} let the container run on too early; what was read may be incomplete")]
    LetGo { socket: PathBuf },
}

/// Everything that the shim tells about its VM.
pub async fn inspect(socket: &Path) -> Result<InspectReply, Error> {
    within(PATIENCE, socket, ask(socket)).await
}

async fn within<T>(
    patience: Duration,
    socket: &Path,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let silent = |_| Error::Silent { socket: socket.to_owned(), patience };
    tokio::time::timeout(patience, work).await.map_err(silent)?
}

/// A container that stands still, with its changes written to its upper folder, until this is dropped.
pub struct Hold {
    socket: PathBuf,
    client: ControlClient<Channel>,
    number: u64,
    /// The shim ends the hold when this ends.
    _stream: Streaming<HoldReply>,
}

impl Hold {
    /// Freezes the container, if wished, and writes its changes back.
    pub async fn begin(socket: &Path, freeze: bool) -> Result<Self, Error> {
        within(HOLD_PATIENCE, socket, Self::ask(socket, freeze)).await
    }

    async fn ask(socket: &Path, freeze: bool) -> Result<Self, Error> {
        let mut client = ControlClient::new(connect(socket).await?);
        let refused = |status| refused(socket, &status);
        let mut stream = client.hold(HoldRequest { freeze }).await.map_err(refused)?.into_inner();
        let reply = stream.message().await.map_err(refused)?;
        let number = reply.ok_or_else(|| Error::LetGo { socket: socket.to_owned() })?.hold;
        Ok(Self { socket: socket.to_owned(), client, number, _stream: stream })
    }

    /// Lets the container run on, and tells how long it was frozen. Fails if it ran before, or does not now.
    pub async fn release(mut self) -> Result<Duration, Error> {
        let socket = self.socket.clone();
        let release = async {
            match self.client.release(ReleaseRequest { hold: self.number }).await {
                Ok(reply) => Ok(Duration::from_micros(reply.into_inner().frozen_micros)),
                // Without a container nothing runs that could have gone on too early; without a shim the
                // VM has ended, too, but nobody knows when.
                Err(status) if status.code() == Code::NotFound => Ok(Duration::ZERO),
                Err(status) if matches!(status.code(), Code::FailedPrecondition | Code::Unavailable) => {
                    Err(Error::LetGo { socket: self.socket.clone() })
                }
                Err(status) => Err(refused(&self.socket, &status)),
            }
        };
        within(HOLD_PATIENCE, &socket, release).await
    }
}

/// The upper folder that the container keeps in its guest, as an archive.
pub async fn read_upper(socket: &Path) -> Result<Streaming<ReadUpperReply>, Error> {
    let ask = async {
        let mut client = ControlClient::new(connect(socket).await?);
        let reply = client.read_upper(ReadUpperRequest {}).await;
        Ok(reply.map_err(|status| refused(socket, &status))?.into_inner())
    };
    within(HOLD_PATIENCE, socket, ask).await
}

/// The container's root as its processes see it, as an archive; `None` if its VM has ended.
pub async fn read_merged(socket: &Path) -> Result<Option<Streaming<ReadUpperReply>>, Error> {
    let ask = async {
        let mut client = ControlClient::new(connect(socket).await?);
        match client.read_merged(ReadMergedRequest {}).await {
            Ok(reply) => Ok(Some(reply.into_inner())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(refused(socket, &status)),
        }
    };
    within(HOLD_PATIENCE, socket, ask).await
}

/// Has the container's root served to streams from the host; the number that they name.
pub async fn export(socket: &Path) -> Result<u32, Error> {
    let ask = async {
        let mut client = ControlClient::new(connect(socket).await?);
        match client.export(ExportRequest {}).await {
            Ok(reply) => Ok(reply.into_inner().export),
            Err(status) if status.code() == Code::Unimplemented => Err(Error::NoExports),
            Err(status) if matches!(status.code(), Code::FailedPrecondition | Code::NotFound) => {
                Err(Error::NotRunning { message: status.message().to_owned() })
            }
            Err(status) => Err(refused(socket, &status)),
        }
    };
    within(EXPORT_PATIENCE, socket, ask).await
}

fn refused(socket: &Path, status: &Status) -> Error {
    if status.code() == Code::NotFound {
        return Error::NotFound { socket: socket.to_owned() };
    }
    Error::Refused { socket: socket.to_owned(), message: status.message().to_owned() }
}

async fn ask(socket: &Path) -> Result<InspectReply, Error> {
    let reply = ControlClient::new(connect(socket).await?).inspect(InspectRequest {}).await;
    Ok(reply.map_err(|status| refused(socket, &status))?.into_inner())
}

/// Connects first and hands gRPC the connection, so that a refused connect keeps its own error.
async fn connect(socket: &Path) -> Result<Channel, Error> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| Error::Connect { socket: socket.to_owned(), source })?;
    let mut stream = Some(TokioIo::new(stream));
    let once = tower::service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async { stream }
    });
    // The name is never resolved: the connector ignores it.
    Endpoint::from_static("http://shim")
        .connect_with_connector(once)
        .await
        .map_err(|source| Error::Channel { socket: socket.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_socket_is_named() {
        let error = inspect(Path::new("/nonexistent/control.sock")).await.unwrap_err();
        assert!(matches!(error, Error::Connect { .. }), "{error:?}");
        assert_eq!(error.to_string(), "The shim does not listen at /nonexistent/control.sock");
    }
}
