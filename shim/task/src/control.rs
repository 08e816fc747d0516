//! What the CLI asks of a running shim: gRPC on the unix socket `control.sock` in the VM's run directory.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, error, warn};
use vmctr_proto::agent::UpperChunk;
use vmctr_proto::control::control_server::{Control, ControlServer};
use vmctr_proto::control::{
    ExportReply, ExportRequest, HoldReply, HoldRequest, InspectReply, InspectRequest, ReadMergedRequest,
    ReadUpperReply, ReadUpperRequest, ReleaseReply, ReleaseRequest,
};

use crate::error::TaskError;
use crate::sandbox::{self, Answer, ContainerRequest, Handle};

/// A caller that does not answer for so long is gone: what it holds is let go.
const CALLER_LIMIT: Duration = Duration::from_secs(20);

/// Between two pieces of what a guest sends.
const GUEST_LIMIT: Duration = Duration::from_secs(30);

/// Between two looks whether the caller is still there.
const CALLER_CHECK: Duration = Duration::from_secs(10);

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
        .http2_keepalive_interval(Some(CALLER_CHECK))
        .http2_keepalive_timeout(Some(CALLER_LIMIT))
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

    type HoldStream = ReceiverStream<Result<HoldReply, Status>>;

    async fn hold(&self, request: Request<HoldRequest>) -> Result<Response<Self::HoldStream>, Status> {
        let (caller, stream) = mpsc::channel(1);
        // A task of its own: a caller that goes away before the answer must not leave the container frozen.
        tokio::spawn(hold(self.0.clone(), request.into_inner().freeze, caller).in_current_span());
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ReadUpperStream = ReceiverStream<Result<ReadUpperReply, Status>>;

    async fn read_upper(
        &self,
        _: Request<ReadUpperRequest>,
    ) -> Result<Response<Self::ReadUpperStream>, Status> {
        self.archive(ContainerRequest::ReadUpper).await
    }

    type ReadMergedStream = ReceiverStream<Result<ReadUpperReply, Status>>;

    async fn read_merged(
        &self,
        _: Request<ReadMergedRequest>,
    ) -> Result<Response<Self::ReadMergedStream>, Status> {
        self.archive(ContainerRequest::ReadMerged).await
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseReply>, Status> {
        let hold = request.into_inner().hold;
        let frozen = self.0.ask_container(|answer| ContainerRequest::Release(hold, answer)).await;
        let frozen = frozen.map_err(|error| status(&error))?;
        let frozen_micros = u64::try_from(frozen.as_micros()).unwrap_or(u64::MAX);
        Ok(Response::new(ReleaseReply { frozen_micros }))
    }

    async fn export(&self, _: Request<ExportRequest>) -> Result<Response<ExportReply>, Status> {
        let export = self.0.ask_container(ContainerRequest::Export).await.map_err(|error| status(&error))?;
        Ok(Response::new(ExportReply { export }))
    }
}

impl Service {
    async fn archive(
        &self,
        which: impl FnOnce(Answer<Streaming<UpperChunk>>) -> ContainerRequest,
    ) -> Result<Response<ReceiverStream<Result<ReadUpperReply, Status>>>, Status> {
        let archive = self.0.ask_container(which).await.map_err(|error| status(&error))?;
        let (caller, stream) = mpsc::channel(1);
        tokio::spawn(pass_on(archive, caller).in_current_span());
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Passes an archive on, piece by piece, as fast as the caller reads.
async fn pass_on(mut archive: Streaming<UpperChunk>, caller: mpsc::Sender<Result<ReadUpperReply, Status>>) {
    loop {
        let piece = match timeout(GUEST_LIMIT, archive.message()).await {
            Ok(Ok(None)) => return,
            Ok(Ok(Some(chunk))) => Ok(ReadUpperReply { data: chunk.data }),
            Ok(Err(refused)) => Err(Status::internal(sandbox::clean(refused.message()))),
            Err(_) => Err(Status::deadline_exceeded("The guest stopped sending its changes")),
        };
        let last = piece.is_err();
        if caller.send(piece).await.is_err() || last {
            return;
        }
    }
}

/// Holds the container for as long as the caller listens, unless it releases before.
async fn hold(handle: Handle, freeze: bool, caller: mpsc::Sender<Result<HoldReply, Status>>) {
    let hold = match handle.ask_container(|answer| ContainerRequest::Hold(freeze, answer)).await {
        Ok(hold) => hold,
        Err(error) => {
            // A caller that has gone needs no answer.
            let _ = caller.send(Err(status(&error))).await;
            return;
        }
    };
    if caller.send(Ok(HoldReply { hold })).await.is_ok() {
        caller.closed().await;
    }
    match handle.ask_container(|answer| ContainerRequest::Release(hold, answer)).await {
        Ok(_) | Err(TaskError::FailedPrecondition(_)) => {}
        Err(error) => error!("The container cannot be let go on: {error}"),
    }
}

fn status(error: &TaskError) -> Status {
    match error {
        TaskError::NotFound(text) => Status::not_found(text),
        TaskError::Unavailable(text) => Status::unavailable(text),
        TaskError::FailedPrecondition(text) => Status::failed_precondition(text),
        TaskError::Unimplemented(text) => Status::unimplemented(text),
        other => Status::internal(other.to_string()),
    }
}
