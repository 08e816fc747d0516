//! containerd's task API for what `ctr` has no verb for or does not print.

use std::future::Future;

use containerd_client::Client;
use containerd_client::services::v1::{DeleteTaskRequest, UpdateTaskRequest};
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
    let request = DeleteTaskRequest { container_id: id.to_owned() };
    block_on(async {
        let client = Client::from_path(rig.daemon().address()).await.expect("containerd answers");
        let reply = client.tasks().delete(in_namespace(request)).await?.into_inner();
        Ok((reply.exit_status, reply.exited_at.map_or(0, |time| time.seconds)))
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
