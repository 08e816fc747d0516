//! containerd's task API for what `ctr` has no verb for or does not print.

use std::future::Future;
use std::time::{Duration, Instant};

use containerd_client::Client;
use containerd_client::services::v1::{
    DeleteResponse, DeleteTaskRequest, KillRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_client::tonic::{Request, Status, metadata::MetadataValue};
use prost_types::Any;
use serde_json::Value;

use super::{NAMESPACE, Rig};

/// Type under which containerd passes an OCI `linux.resources` object as JSON.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Changes a running container's limits.
pub fn update(rig: &Rig, id: &str, resources: &Value) -> Result<(), Status> {
    let request = UpdateTaskRequest {
        container_id: id.to_owned(),
        resources: Some(Any { type_url: RESOURCES.to_owned(), value: resources.to_string().into_bytes() }),
        ..UpdateTaskRequest::default()
    };
    block_on(async {
        let client = Client::from_path(rig.daemon().address()).await.expect("containerd answers");
        client.tasks().update(in_namespace(request)).await.map(|_| ())
    })
}

/// Deletes a stopped task; returns its exit code and the end's time, in seconds since the Unix epoch.
pub fn delete(rig: &Rig, id: &str) -> Result<(u32, i64), Status> {
    let (reply, _) = delete_task(rig, id)?;
    Ok((reply.exit_status, reply.exited_at.map_or(0, |time| time.seconds)))
}

/// Deletes a stopped task; how long that took.
pub fn timed_delete(rig: &Rig, id: &str) -> Result<Duration, Status> {
    delete_task(rig, id).map(|(_, took)| took)
}

fn delete_task(rig: &Rig, id: &str) -> Result<(DeleteResponse, Duration), Status> {
    let request = DeleteTaskRequest { container_id: id.to_owned() };
    block_on(async {
        let client = Client::from_path(rig.daemon().address()).await.expect("containerd answers");
        let began = Instant::now();
        let reply = client.tasks().delete(in_namespace(request)).await?.into_inner();
        Ok((reply, began.elapsed()))
    })
}

/// Sends SIGKILL to a container's first process; how long until containerd knew of its exit.
pub fn kill(rig: &Rig, id: &str) -> Result<Duration, Status> {
    const SIGKILL: u32 = 9;
    let request = KillRequest { container_id: id.to_owned(), signal: SIGKILL, ..KillRequest::default() };
    let exit = WaitRequest { container_id: id.to_owned(), ..WaitRequest::default() };
    block_on(async {
        let client = Client::from_path(rig.daemon().address()).await.expect("containerd answers");
        let (mut waiting, mut killing) = (client.tasks(), client.tasks());
        let began = Instant::now();
        let (exited, killed) =
            tokio::join!(waiting.wait(in_namespace(exit)), killing.kill(in_namespace(request)));
        killed.and(exited).map(|_| began.elapsed())
    })
}

fn in_namespace<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
    request
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}
