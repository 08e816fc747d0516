//! Client of a shim's control socket: one request, one answer, a limit on the time it may take.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use vmctr_proto::control::control_client::ControlClient;
use vmctr_proto::control::{InspectReply, InspectRequest};

/// How long a shim may take: it only looks at what it knows.
const PATIENCE: Duration = Duration::from_secs(5);

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
    #[error("The shim at {socket} did not answer within {} s", PATIENCE.as_secs())]
    Silent { socket: PathBuf },
}

/// Everything that the shim tells about its VM.
pub async fn inspect(socket: &Path) -> Result<InspectReply, Error> {
    let silent = |_| Error::Silent { socket: socket.to_owned() };
    tokio::time::timeout(PATIENCE, ask(socket)).await.map_err(silent)?
}

async fn ask(socket: &Path) -> Result<InspectReply, Error> {
    let reply = ControlClient::new(connect(socket).await?).inspect(InspectRequest {}).await;
    let refused = |status: tonic::Status| Error::Refused {
        socket: socket.to_owned(),
        message: status.message().to_owned(),
    };
    Ok(reply.map_err(refused)?.into_inner())
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
