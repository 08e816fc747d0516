//! containerd's task API, translated: protobuf on one side, requests to the driver on the other. No decision is
//! made here except what belongs to the form of a message.
//!
//! The service answers under the names of task API v2 (containerd 1.6, 1.7) and v3 (2.x): the messages are the
//! same.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim::protos::api::ProcessInfo;
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim::oci::ProcessDetails;
use containerd_shim::util::convert_to_any;
use containerd_shim::{Task, TtrpcContext, TtrpcResult};
use tracing::debug;

use crate::error::{Result, TaskError};
use crate::events::timestamp;
use crate::sandbox::{
    ContainerRequest, CreateRequest, Deleted, ExecRequest, Exit, Handle, Phase, Pid, Request, StateReply,
};
use crate::stats;
use crate::stdio::Names;

/// How long nothing may move in the output of a container that ended before the rest of it is dropped.
const INIT_QUIET: Duration = Duration::from_secs(10);

/// The same for an exec, whose children may hold its output open for as long as they live.
const EXEC_QUIET: Duration = Duration::from_secs(2);

/// How long a start waits for readers of the output.
const READER_LIMIT: Duration = Duration::from_secs(1);

/// The task service of one container.
pub struct Service {
    container_id: String,
    handle: Handle,
}

impl Service {
    /// Answers for this container.
    pub fn new(container_id: String, handle: Handle) -> Self {
        Self { container_id, handle }
    }

    /// Every request names the container, and there is one.
    fn check_id(&self, id: &str) -> Result<()> {
        if id == self.container_id {
            return Ok(());
        }
        Err(TaskError::NotFound(format!(
            "container {id} does not exist; this shim runs {}",
            self.container_id
        )))
    }

    async fn container<T>(
        &self,
        id: &str,
        make: impl FnOnce(crate::sandbox::Answer<T>) -> ContainerRequest,
    ) -> Result<T> {
        self.check_id(id)?;
        self.handle.ask_container(make).await
    }

    /// Output has somewhere to go before its process says anything. The driver does other things meanwhile.
    async fn wait_for_readers(&self, id: &str, exec_id: &str) -> Result<()> {
        let exec = exec_id.to_owned();
        let outputs = self.container(id, |answer| ContainerRequest::Opening(exec, answer)).await?;
        if let Some(outputs) = outputs {
            outputs.opened(READER_LIMIT).await;
        }
        Ok(())
    }

    /// Output comes before the end of its process is forgotten. As above.
    async fn drain(&self, exec_id: &str) -> Result<()> {
        let exec = exec_id.to_owned();
        let outputs = self.handle.ask_container(|answer| ContainerRequest::Outputs(exec, answer)).await?;
        if let Some(outputs) = outputs {
            outputs.drain(if exec_id.is_empty() { INIT_QUIET } else { EXEC_QUIET }).await;
        }
        Ok(())
    }
}

#[async_trait]
impl Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> TtrpcResult<CreateTaskResponse> {
        self.check_id(&request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(no_checkpoints().into());
        }
        let names = Names {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let create = CreateRequest { bundle: PathBuf::from(request.bundle), rootfs: request.rootfs, names };
        let pid = self.handle.ask(|answer| Request::Create(Box::new(create), answer)).await?;
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> TtrpcResult<StartResponse> {
        let exec_id = request.exec_id;
        self.wait_for_readers(&request.id, &exec_id).await?;
        let pid = self.container(&request.id, |answer| ContainerRequest::Start(exec_id, answer)).await?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        self.check_id(&request.id)?;
        self.drain(&request.exec_id).await?;
        let deleted = self.handle.ask(|answer| Request::Delete(request.exec_id, answer)).await?;
        Ok(delete_response(deleted))
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> TtrpcResult<Empty> {
        let names = Names {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let spec = request.spec.into_option().unwrap_or_default().value;
        let exec = ExecRequest { exec_id: request.exec_id, spec, names };
        self.container(&request.id, |answer| ContainerRequest::Exec(exec, answer)).await?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> TtrpcResult<Empty> {
        let (exec_id, size) = (request.exec_id, (request.width, request.height));
        self.container(&request.id, |answer| ContainerRequest::Resize { exec_id, size, answer }).await?;
        Ok(Empty::default())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> TtrpcResult<StateResponse> {
        let exec_id = request.exec_id.clone();
        let state = self.container(&request.id, |answer| ContainerRequest::State(exec_id, answer)).await?;
        Ok(state_response(request.id, request.exec_id, state))
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> TtrpcResult<WaitResponse> {
        let exec_id = request.exec_id;
        let mut exit = self.container(&request.id, |answer| ContainerRequest::Wait(exec_id, answer)).await?;
        let gone = || TaskError::NotFound("the process was deleted".into());
        let exit = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).ok_or_else(gone)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..WaitResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> TtrpcResult<Empty> {
        let KillRequest { id, exec_id, signal, all, .. } = request;
        self.container(&id, |answer| ContainerRequest::Kill { exec_id, signal, all, answer }).await?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> TtrpcResult<PidsResponse> {
        let pids = self.container(&request.id, ContainerRequest::Pids).await?;
        let processes = pids.into_iter().map(process_info).collect::<Result<_>>()?;
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> TtrpcResult<Empty> {
        self.container(&request.id, ContainerRequest::Pause).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> TtrpcResult<Empty> {
        self.container(&request.id, ContainerRequest::Resume).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> TtrpcResult<Empty> {
        let exec_id = request.exec_id;
        if request.stdin {
            self.container(&request.id, |answer| ContainerRequest::CloseStdin(exec_id, answer)).await?;
        }
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> TtrpcResult<StatsResponse> {
        let figures = self.container(&request.id, ContainerRequest::Stats).await?;
        let stats = stats::metrics(&figures).map_err(|error| TaskError::internal("Cannot encode", &error))?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..StatsResponse::default() })
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> TtrpcResult<Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        self.container(&request.id, |answer| ContainerRequest::Update(resources, answer)).await?;
        Ok(Empty::default())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        self.check_id(&request.id)?;
        let task_pid = self.handle.ask(Request::Connect).await?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> TtrpcResult<Empty> {
        Err(no_checkpoints().into())
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> TtrpcResult<Empty> {
        debug!(id = request.id, "Shutdown requested");
        self.handle.ask(Request::Shutdown).await?;
        Ok(Empty::default())
    }
}

fn no_checkpoints() -> TaskError {
    TaskError::Unimplemented("checkpoints of a VM's container are not supported".into())
}

/// The reply to a delete, also of the shim binary's `delete` action.
pub fn delete_response(deleted: Deleted) -> DeleteResponse {
    DeleteResponse {
        pid: deleted.pid,
        exit_status: deleted.exit.status,
        exited_at: MessageField::some(timestamp(deleted.exit.at)),
        ..DeleteResponse::default()
    }
}

fn state_response(id: String, exec_id: String, state: StateReply) -> StateResponse {
    let StateReply { pid, phase, names, bundle } = state;
    let mut response = StateResponse {
        id,
        exec_id,
        bundle: bundle.display().to_string(),
        pid,
        status: status(phase).into(),
        stdin: names.stdin,
        stdout: names.stdout,
        stderr: names.stderr,
        terminal: names.terminal,
        ..StateResponse::default()
    };
    if let Phase::Stopped(Exit { status, at }) = phase {
        response.exit_status = status;
        response.exited_at = MessageField::some(timestamp(at));
    }
    response
}

fn status(phase: Phase) -> Status {
    match phase {
        Phase::Created => Status::CREATED,
        Phase::Running => Status::RUNNING,
        Phase::Paused => Status::PAUSED,
        Phase::Stopped(_) => Status::STOPPED,
    }
}

fn process_info(process: Pid) -> Result<ProcessInfo> {
    let info = if process.exec_id.is_empty() { None } else { Some(process_details(process.exec_id)?) };
    Ok(ProcessInfo { pid: process.pid, info: info.into(), ..ProcessInfo::default() })
}

fn process_details(exec_id: String) -> Result<Any> {
    let details = ProcessDetails { exec_id, ..ProcessDetails::default() };
    convert_to_any(Box::new(details)).map_err(|error| TaskError::internal("Cannot encode", &error))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn state(phase: Phase) -> StateResponse {
        let reply = StateReply { pid: 7, phase, names: Names::default(), bundle: "/b".into() };
        state_response("c1".into(), "e1".into(), reply)
    }

    #[test]
    fn an_end_is_told_with_status_and_time() {
        let at = UNIX_EPOCH + Duration::new(5, 6);
        let response = state(Phase::Stopped(Exit { status: 137, at }));
        assert_eq!((response.status(), response.exit_status), (Status::STOPPED, 137));
        assert_eq!((response.exited_at.seconds, response.exited_at.nanos), (5, 6));
        assert_eq!((response.id.as_str(), response.exec_id.as_str(), response.pid), ("c1", "e1", 7));
        assert!(state(Phase::Running).exited_at.is_none());
    }

    #[test]
    fn execs_are_marked_in_the_list_of_processes() {
        let info = process_info(Pid { pid: 9, exec_id: "e1".into() }).unwrap();
        assert_eq!(info.info.type_url, "containerd.runc.v1.ProcessDetails");
        assert!(process_info(Pid { pid: 1, exec_id: String::new() }).unwrap().info.is_none());
    }

    #[tokio::test]
    async fn requests_for_another_container_are_not_found() {
        let (handle, _queue) = Handle::new();
        let service = Service::new("c1".into(), handle);
        let error = service.check_id("c2").unwrap_err();
        assert!(matches!(error, TaskError::NotFound(_)), "{error}");
        service.check_id("c1").unwrap();
    }

    #[tokio::test]
    async fn without_a_driver_nothing_exists() {
        let (handle, queue) = Handle::new();
        drop(queue);
        let service = Service::new("c1".into(), handle);
        let missing = service.container("c1", ContainerRequest::Pids).await.unwrap_err();
        assert!(matches!(missing, TaskError::NotFound(_)), "{missing}");
        let ended = service.handle.ask(Request::Connect).await.unwrap_err();
        assert!(matches!(ended, TaskError::Unavailable(_)), "{ended}");
    }
}
