//! What the CLI asks of a running shim: gRPC on the unix socket `control.sock` in the VM's run directory.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::net::UnixListener;
use tokio::task::AbortHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};
use tracing::warn;
use vmctr_proto::control::control_server::{Control, ControlServer};
use vmctr_proto::control::{InspectReply, InspectRequest};

use crate::error::TaskError;
use crate::sandbox::{self, Handle};

/// The running service; dropping it ends it.
#[derive(Debug)]
pub struct Server(AbortHandle);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves on `path`. A container runs without it too, so a failure is logged.
pub fn serve(path: &Path, handle: Handle) -> Option<Server> {
    let listener = bind(path).inspect_err(|error| warn!("Cannot serve {}: {error}", path.display())).ok()?;
    let service = ControlServer::new(Service(handle));
    let serve = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(UnixListenerStream::new(listener));
    let task = tokio::spawn(async move {
        if let Err(error) = serve.await {
            warn!("The control service ended: {error}");
        }
    });
    Some(Server(task.abort_handle()))
}

/// The directory is root's alone; so is the socket.
fn bind(path: &Path) -> io::Result<UnixListener> {
    const OWNER_ONLY: u32 = 0o600;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(OWNER_ONLY))?;
    Ok(listener)
}

struct Service(Handle);

#[tonic::async_trait]
impl Control for Service {
    async fn inspect(&self, _: Request<InspectRequest>) -> Result<Response<InspectReply>, Status> {
        self.0.ask(sandbox::Request::Inspect).await.map(Response::new).map_err(|error| status(&error))
    }
}

fn status(error: &TaskError) -> Status {
    match error {
        TaskError::NotFound(text) => Status::not_found(text),
        TaskError::Unavailable(text) => Status::unavailable(text),
        other => Status::internal(other.to_string()),
    }
}
