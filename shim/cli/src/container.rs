//! A container as containerd records it: what its root is made of and what it was started from.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::Context as _;
use containerd_client::Client;
use containerd_client::services::v1::snapshots::MountsRequest;
use containerd_client::services::v1::{Container as Record, GetContainerRequest};
use containerd_client::tonic::metadata::MetadataValue;
use containerd_client::tonic::{Code, Request, Status};
use serde::Deserialize;
use vmctr_images::root::{self, Mount, RootPlan, UpperChoice};

use crate::commands::Context;
use crate::containerd;
use crate::failure::Failure;

/// The runtime whose containers have VMs.
const RUNTIME: &str = "io.containerd.vmctr.v2";

/// A container.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its ID.
    pub id: String,
    /// Name of the image; empty for `ctr run --rootfs`.
    pub image: String,
    /// Which snapshotter has its root; empty without a snapshot.
    pub snapshotter: String,
    /// What its root is made of.
    pub root: RootPlan,
}

/// Of the OCI runtime spec, what matters here.
#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: HashMap<String, String>,
    root: Option<Root>,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

/// Fails unless containerd has the container and vmctr runs it.
pub async fn check(context: &Context, client: &Client, id: &str) -> Result<(), Failure> {
    record(context, client, id).await.map(drop)
}

/// Asks containerd for the container.
pub async fn find(context: &Context, client: &Client, id: &str) -> Result<Container, Failure> {
    let container = record(context, client, id).await?;
    let spec = container.spec.context("the container has no spec")?;
    let spec: Spec = serde_json::from_slice(&spec.value).context("the container's spec is malformed")?;
    let mounts = mounts(context, client, &container.snapshotter, &container.snapshot_key).await?;
    let upper = UpperChoice::of(&spec.annotations)?;
    let root = root::plan(&mounts, spec.root.map(|root| root.path).as_deref(), &upper)?;
    Ok(Container { id: id.to_owned(), image: container.image, snapshotter: container.snapshotter, root })
}

/// What containerd has written down of a container of ours.
async fn record(context: &Context, client: &Client, id: &str) -> Result<Record, Failure> {
    let request = context.request(GetContainerRequest { id: id.to_owned() })?;
    let reply = client.containers().get(request).await.map_err(|status| missing(context, id, &status))?;
    let container = reply.into_inner().container.context("containerd answered without a container")?;
    let runtime = container.runtime.as_ref().map(|runtime| runtime.name.as_str()).unwrap_or_default();
    if runtime != RUNTIME {
        let error = anyhow::anyhow!("Container {id} runs under {runtime}, not under {RUNTIME}");
        return Err(Failure::failed(error).hint("vmctr reads containers that it runs in VMs"));
    }
    Ok(container)
}

async fn mounts(
    context: &Context,
    client: &Client,
    snapshotter: &str,
    key: &str,
) -> Result<Vec<Mount>, Failure> {
    if key.is_empty() {
        return Ok(vec![]);
    }
    let request =
        context.request(MountsRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() })?;
    let reply = client.snapshots().mounts(request).await.map_err(|status| {
        anyhow::anyhow!("containerd does not give the mounts of snapshot {key}: {}", status.message())
    })?;
    let mount = |mount: containerd_client::types::Mount| Mount {
        kind: mount.r#type,
        source: mount.source,
        options: mount.options,
    };
    Ok(reply.into_inner().mounts.into_iter().map(mount).collect())
}

fn missing(context: &Context, id: &str, status: &Status) -> Failure {
    let namespace = &context.namespace;
    if status.code() == Code::NotFound {
        let error = anyhow::anyhow!("No container {id} in namespace {namespace}");
        return Failure::not_found(error).hint(format!("`ctr -n {namespace} containers ls` lists them"));
    }
    Failure::failed(anyhow::anyhow!("containerd does not tell about container {id}: {}", status.message()))
}

impl Context {
    /// Where the VMs' directories are.
    pub fn run_dir(&self) -> Result<PathBuf, Failure> {
        Ok(vmctr_vmm::config::Config::load()?.run_dir)
    }

    /// A connection to containerd.
    pub async fn containerd(&self) -> Result<Client, containerd::Error> {
        containerd::connect(&self.address).await
    }

    /// A request in the namespace.
    pub fn request<T>(&self, message: T) -> Result<Request<T>, Failure> {
        let mut request = Request::new(message);
        let namespace: MetadataValue<_> = self
            .namespace
            .parse()
            .with_context(|| format!("{:?} is no name of a namespace", self.namespace))?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        Ok(request)
    }
}
