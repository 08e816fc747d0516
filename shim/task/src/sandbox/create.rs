//! From containerd's create request to a prepared container; each step that fails takes back those before it.
//!
//! ```text
//!   spec, mounts, annotations checked   nothing started yet: refusals are cheap and come first
//!   streams opened at containerd's end
//!   session started                     VM, share daemon, agent
//!   createRuntime hooks                 on the host
//!   streams dialled, CreateContainer    in the guest
//! ```

use std::path::PathBuf;

use containerd_shim::protos::api::Mount;
use oci_spec::runtime::Hooks;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use vmctr_images::root::{self, RootPlan, Upper, UpperChoice};
use vmctr_proto::agent::{CreateContainerRequest, Root};
use vmctr_vmm::run_dir::Owner;
use vmctr_vmm::spec::{Host, StartMode, VmSpec};

use super::container::{CREATE_LIMIT, Container};
use super::driver::Identity;
use super::guest_events::GuestEvent;
use super::session::{Session, SessionPlan};
use super::share::{guest_root, share_spec};
use super::task::Task;
use super::warm::Warm;
use crate::annotations::upper_choice;
use crate::error::{Result, TaskError};
use crate::hooks::{self, Moment, State};
use crate::oci::OciSpec;
use crate::stdio::{self, Endpoints, Names};

/// What containerd asks for.
#[derive(Debug)]
pub struct CreateRequest {
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Root file system.
    pub rootfs: Vec<Mount>,
    /// Streams of the init process.
    pub names: Names,
}

/// Everything that was decided before anything was started.
struct Plan {
    session: SessionPlan,
    spec: Vec<u8>,
    root: Root,
    hooks: Hooks,
    state: State,
}

/// Builds the container and, with it, its VM.
pub async fn create(
    identity: &Identity,
    request: CreateRequest,
    warm: Option<Warm>,
) -> Result<(Container, mpsc::Receiver<GuestEvent>)> {
    let CreateRequest { bundle, rootfs, names } = request;
    let (owner, ids) = (identity.owner(bundle), identity.clone());
    let opening = names.clone();
    // Folders, FIFOs and logging programs are looked at with blocking calls.
    let prepared = spawn_blocking(move || {
        let plan = plan(&ids, owner, &rootfs)?;
        let endpoints = stdio::open(&opening, &ids.container_id, &ids.namespace)
            .map_err(|error| TaskError::invalid(&error))?;
        Ok::<_, TaskError>((plan, endpoints))
    });
    let (plan, endpoints) =
        prepared.await.map_err(|error| TaskError::internal("Cannot prepare", &error))??;
    let Plan { session, spec, root, hooks, state } = plan;
    let (session, events) = Session::start(&identity.config, session, warm)
        .await
        .map_err(|error| TaskError::internal("Cannot create the container's VM", &error))?;
    let mut container = Container::new(identity, session, hooks, state);
    match prepare(&mut container, spec, root, endpoints, names).await {
        Ok(()) => Ok((container, events)),
        Err(error) => {
            container.abandon().await;
            Err(error)
        }
    }
}

fn plan(identity: &Identity, owner: Owner, rootfs: &[Mount]) -> Result<Plan> {
    let invalid = |error: &dyn std::error::Error| TaskError::invalid(error);
    let spec = OciSpec::load(&owner.bundle).map_err(|error| invalid(&error))?;
    let annotations = spec.annotations();
    let upper = upper_choice(&annotations).map_err(|error| invalid(&error))?;
    let rootfs: Vec<_> = rootfs.iter().map(described).collect();
    let root = root::plan(&rootfs, spec.root_path().as_deref(), &upper).map_err(|error| invalid(&error))?;
    root.check().map_err(|error| invalid(&error))?;
    let guest = spec.for_guest(&owner.container_id).map_err(|error| invalid(&error))?;
    let vm = VmSpec::resolve(&identity.config.vm, &spec.limits(), &annotations, &Host::detect())
        .map_err(|error| invalid(&error))?;
    let start =
        StartMode::resolve(identity.config.vm.start, &annotations).map_err(|error| invalid(&error))?;
    let state = State {
        oci_version: spec.version().to_owned(),
        id: owner.container_id.clone(),
        status: "creating",
        pid: None,
        bundle: owner.bundle.clone(),
        annotations,
    };
    let share = share_spec(&root, &guest.volumes);
    let work_dir = own_work_dir(&upper, &root);
    Ok(Plan {
        session: SessionPlan { owner, vm, start, share, work_dir },
        spec: guest.json,
        root: guest_root(&root),
        hooks: spec.hooks(),
        state,
    })
}

fn described(mount: &Mount) -> root::Mount {
    let Mount { type_, source, options, .. } = mount.clone();
    root::Mount { kind: type_, source, options }
}

/// The work folder that nobody but us would make: the one beside an upper-dir.
fn own_work_dir(upper: &UpperChoice, root: &RootPlan) -> Option<PathBuf> {
    match (upper, root) {
        (UpperChoice::HostDir(_), RootPlan::Union { upper: Upper::Host { work, .. }, .. }) => {
            Some(work.clone())
        }
        _ => None,
    }
}

async fn prepare(
    container: &mut Container,
    spec: Vec<u8>,
    root: Root,
    endpoints: Endpoints,
    names: Names,
) -> Result<()> {
    hooks::run(container.hooks(), Moment::Create, &container.hook_state("created"))
        .await
        .map_err(|error| TaskError::internal("Cannot create the container", &error))?;
    let container_id = container.id().to_owned();
    let session = container.session_mut()?;
    let (stdio, streams) = session
        .open_streams(endpoints.wanted(), names.terminal)
        .await
        .map_err(|error| TaskError::internal("Cannot open the container's streams", &error))?;
    let request = CreateContainerRequest { container_id, spec, root: Some(root), stdio: Some(stdio) };
    session
        .agent()
        .call("create the container", CREATE_LIMIT, |mut agent| async move {
            agent.create_container(request).await
        })
        .await?;
    let io = endpoints.start(streams).map_err(|error| TaskError::internal("Cannot start", &error))?;
    container.insert(String::new(), Task::init(names, io));
    container.prepared();
    Ok(())
}
