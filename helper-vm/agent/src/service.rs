//! The gRPC service: thin. It translates, and starts one verb per call.

use std::io;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use vmctr_proto::agent::agent_server::{Agent, AgentServer};
use vmctr_proto::agent::{
    AddUnionRequest, ContainerRef, CreateContainerRequest, CreateExecRequest, Empty, Event, EventsRequest,
    ExportContainerReply, HelloReply, HelloRequest, MountShareRequest, PidsReply, ProcessRef,
    ResizePtyRequest, SignalRequest, StartReply, StatsReply, UnionRef, UpdateRequest, UpperChunk,
};
use vmctr_proto::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, negotiate, ports};

use crate::boot::console;
use crate::devices;
use crate::exports::Exports;
use crate::guest::{self, Handle};
use crate::identity;
use crate::stdio::accept::accept;
use crate::verbs;

/// Events on their way to the host before the next is taken from the log.
const EVENTS_AHEAD: usize = 64;
/// Pieces of an archive on their way to the host before the next is read.
const CHUNKS_AHEAD: usize = 4;
/// How long the host has to take the one connection that says that the agent serves.
const READY_TIME: Duration = Duration::from_secs(10);

struct Service {
    guest: Handle,
    exports: Exports,
}

/// Serves until the guest ends.
pub fn serve() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (guest, actor) = guest::start().context("starting the actor")?;
        let rehearsal = verbs::rehearse(guest.clone());
        let agent = listen(ports::AGENT)?;
        tokio::spawn(accept(listen(ports::STDIO)?, guest.clone()));
        let exports = Exports::listen().with_context(|| format!("vsock port {}", ports::EXPORT))?;
        let service = AgentServer::new(Service { guest, exports });
        let server =
            tokio::spawn(Server::builder().add_service(service).serve_with_incoming(agent.incoming()));
        console::info(concat!("version ", env!("CARGO_PKG_VERSION"), " serves"));
        let rehearsed = async { rehearsal.await.context("rehearsing a container") };
        devices::wait(rehearsed).await.context("waiting for the vsock device")?;
        tell_ready().await;
        tokio::select! {
            served = server => served?.context("serving gRPC"),
            defect = actor => defect.context("the actor"),
        }
    })
}

fn listen(port: u32) -> anyhow::Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).with_context(|| format!("vsock port {port}"))
}

/// One connection, closed at once.
async fn tell_ready() {
    let host = VsockAddr::new(VMADDR_CID_HOST, ports::READY);
    let outcome = match tokio::time::timeout(READY_TIME, VsockStream::connect(host)).await {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => error,
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    // The host decides what a guest is worth that it has not heard of.
    console::warn(&format!("telling the host that the agent serves: {outcome}"));
}

/// Runs a verb to its end, also when the host stops waiting.
async fn run<T: Send + 'static>(
    verb: impl Future<Output = Result<T, verbs::Error>> + Send + 'static,
) -> Result<Response<T>, Status> {
    match tokio::spawn(verb).await {
        Ok(Ok(reply)) => Ok(Response::new(reply)),
        Ok(Err(error)) => Err(error.to_status()),
        Err(error) => Err(Status::internal(format!("the agent failed: {error}"))),
    }
}

async fn done(
    verb: impl Future<Output = Result<(), verbs::Error>> + Send + 'static,
) -> Result<Response<Empty>, Status> {
    run(async { verb.await.map(|()| Empty {}) }).await
}

#[tonic::async_trait]
impl Agent for Service {
    type EventsStream = ReceiverStream<Result<Event, Status>>;

    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let hello = request.into_inner();
        let protocol = negotiate(hello.protocol_min, hello.protocol_max).ok_or_else(|| {
            Status::failed_precondition(format!(
                "the host speaks protocol {} to {}, this agent {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION}: rebuild the guest with vmctr guest build",
                hello.protocol_min, hello.protocol_max
            ))
        })?;
        identity::assume(&hello.random_seed, hello.wall_clock_ns).map_err(|error| error.to_status())?;
        let memory = rustix::system::sysinfo();
        Ok(Response::new(HelloReply {
            protocol,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            memory_total_bytes: memory.totalram as u64 * u64::from(memory.mem_unit),
        }))
    }

    async fn rehearse(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        done(verbs::rehearse(self.guest.clone())).await
    }

    async fn mount_share(&self, request: Request<MountShareRequest>) -> Result<Response<Empty>, Status> {
        done(verbs::mount_share(self.guest.clone(), request.into_inner())).await
    }

    async fn events(&self, request: Request<EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let (sender, receiver) = mpsc::channel(EVENTS_AHEAD);
        tokio::spawn(send_events(self.guest.clone(), request.into_inner().after, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<Empty>, Status> {
        done(verbs::create(self.guest.clone(), request.into_inner())).await
    }

    async fn create_exec(&self, request: Request<CreateExecRequest>) -> Result<Response<Empty>, Status> {
        done(verbs::register(self.guest.clone(), request.into_inner())).await
    }

    async fn start(&self, request: Request<ProcessRef>) -> Result<Response<StartReply>, Status> {
        run(verbs::start(self.guest.clone(), request.into_inner())).await
    }

    async fn signal(&self, request: Request<SignalRequest>) -> Result<Response<Empty>, Status> {
        done(verbs::signal(self.guest.clone(), request.into_inner())).await
    }

    async fn resize_pty(&self, request: Request<ResizePtyRequest>) -> Result<Response<Empty>, Status> {
        done(verbs::resize(self.guest.clone(), request.into_inner())).await
    }

    async fn delete(&self, request: Request<ProcessRef>) -> Result<Response<Empty>, Status> {
        done(verbs::delete(self.guest.clone(), request.into_inner())).await
    }

    async fn pause(&self, request: Request<ContainerRef>) -> Result<Response<Empty>, Status> {
        done(verbs::freeze(self.guest.clone(), request.into_inner())).await
    }

    async fn resume(&self, request: Request<ContainerRef>) -> Result<Response<Empty>, Status> {
        done(verbs::thaw(self.guest.clone(), request.into_inner())).await
    }

    async fn pids(&self, request: Request<ContainerRef>) -> Result<Response<PidsReply>, Status> {
        run(verbs::pids(self.guest.clone(), request.into_inner())).await
    }

    async fn stats(&self, request: Request<ContainerRef>) -> Result<Response<StatsReply>, Status> {
        run(verbs::stats(self.guest.clone(), request.into_inner())).await
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Result<Response<Empty>, Status> {
        done(verbs::update(self.guest.clone(), request.into_inner())).await
    }

    type ReadUpperStream = ReceiverStream<Result<UpperChunk, Status>>;

    async fn read_upper(
        &self,
        request: Request<ContainerRef>,
    ) -> Result<Response<Self::ReadUpperStream>, Status> {
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let read = verbs::read_upper(self.guest.clone(), request.into_inner(), sender.clone());
        tokio::spawn(send_archive(read, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type ReadMergedStream = ReceiverStream<Result<UpperChunk, Status>>;

    async fn read_merged(
        &self,
        request: Request<ContainerRef>,
    ) -> Result<Response<Self::ReadMergedStream>, Status> {
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let read = verbs::read_merged(self.guest.clone(), request.into_inner(), sender.clone());
        tokio::spawn(send_archive(read, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn flush(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        done(verbs::flush(self.guest.clone())).await
    }

    async fn add_union(&self, request: Request<AddUnionRequest>) -> Result<Response<Empty>, Status> {
        done(verbs::add_union(self.exports.clone(), request.into_inner())).await
    }

    async fn flush_union(&self, request: Request<UnionRef>) -> Result<Response<Empty>, Status> {
        done(verbs::flush_union(request.into_inner())).await
    }

    async fn remove_union(&self, request: Request<UnionRef>) -> Result<Response<Empty>, Status> {
        done(verbs::remove_union(self.exports.clone(), request.into_inner())).await
    }

    async fn export_container(
        &self,
        request: Request<ContainerRef>,
    ) -> Result<Response<ExportContainerReply>, Status> {
        let (guest, exports) = (self.guest.clone(), self.exports.clone());
        run(verbs::export_container(guest, exports, request.into_inner())).await
    }
}

/// Feeds one archive to the host, and the error that ended it early.
async fn send_archive(read: impl Future<Output = Result<(), verbs::Error>>, host: verbs::UpperSender) {
    if let Err(error) = read.await {
        let _ = host.send(Err(error.to_status())).await;
    }
}

/// Feeds one event stream until the host closes it.
async fn send_events(guest: Handle, mut after: u64, host: mpsc::Sender<Result<Event, Status>>) {
    guest.call(move |guest| guest.events.acknowledge(after)).await;
    loop {
        let next = guest.call(move |guest| guest.events.next(after)).await;
        let batch = tokio::select! {
            batch = next => batch,
            () = host.closed() => return,
        };
        match batch {
            Ok(Ok(events)) => {
                for event in events {
                    after = event.sequence;
                    if host.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
            }
            Ok(Err(gone)) => {
                let _ = host.send(Err(Status::data_loss(gone.to_string()))).await;
                return;
            }
            Err(_) => return,
        }
    }
}
