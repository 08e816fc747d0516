//! gRPC that is well-formed and untrue, endless or huge. Where it does not lie it agrees to everything.

use std::pin::Pin;

use tokio_stream::{Stream, StreamExt, iter, pending};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use vmctr_proto::agent::agent_server::{Agent, AgentServer};
use vmctr_proto::agent::{
    AddUnionRequest, ContainerRef, CreateContainerRequest, CreateExecRequest, Empty, Event, EventsRequest,
    ExitEvent, ExportContainerReply, HelloReply, HelloRequest, MountShareRequest, PidsReply, ProcessId,
    ProcessRef, ResizePtyRequest, SignalRequest, StartReply, StatsReply, UnionRef, UpdateRequest, UpperChunk,
    event,
};
use vmctr_proto::ports;

use crate::say_ready;

/// What it lies about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// Speaks a protocol that nobody does.
    Version,
    /// The first answer is far larger than any should be.
    Huge,
    /// Refuses the container with a message full of terminal controls.
    Message,
    /// Never answers the call that makes the container.
    Hang,
    /// Events of processes that never were, without end.
    Events,
    /// Events whose numbers jump.
    Sequence,
    /// Lists of processes larger than the guest could hold.
    Pids,
}

/// Serves with the lie that a test asks for.
pub fn serve(name: &str) {
    let lie = match name {
        "version" => Lie::Version,
        "huge" => Lie::Huge,
        "message" => Lie::Message,
        "hang" => Lie::Hang,
        "events" => Lie::Events,
        "sequence" => Lie::Sequence,
        "pids" => Lie::Pids,
        other => panic!("no such mode: {other}"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let bind =
            |port| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).expect("the port is free");
        let (agent, stdio) = (bind(ports::AGENT), bind(ports::STDIO));
        tokio::spawn(pour_stdio(stdio));
        say_ready();
        let service = AgentServer::new(Liar(lie));
        Server::builder()
            .add_service(service)
            .serve_with_incoming(agent.incoming())
            .await
            .expect("it serves");
    });
}

/// Every stream of the container brings bytes without end.
async fn pour_stdio(listener: VsockListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let block = vec![b'z'; 65536];
            while tokio::io::AsyncWriteExt::write_all(&mut stream, &block).await.is_ok() {}
        });
    }
}

struct Liar(Lie);

type Reply<T> = Result<Response<T>, Status>;

fn agree() -> Reply<Empty> {
    Ok(Response::new(Empty {}))
}

fn exit(sequence: u64) -> Event {
    let process = ProcessRef { container_id: "\u{1b}[2J".repeat(100), exec_id: "x".repeat(10_000) };
    let exit = ExitEvent { process: Some(process), status: u32::MAX };
    Event { sequence, kind: Some(event::Kind::Exit(exit)) }
}

#[tonic::async_trait]
impl Agent for Liar {
    type EventsStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn hello(&self, request: Request<HelloRequest>) -> Reply<HelloReply> {
        let asked = request.into_inner();
        let protocol = if self.0 == Lie::Version { 99 } else { asked.protocol_max };
        let length = if self.0 == Lie::Huge { 64 << 20 } else { 4 };
        let agent_version = "v".repeat(length);
        Ok(Response::new(HelloReply {
            protocol,
            agent_version,
            kernel_release: "\u{1b}[31mlies".to_owned(),
            memory_total_bytes: u64::MAX,
        }))
    }

    async fn rehearse(&self, _: Request<Empty>) -> Reply<Empty> {
        agree()
    }

    async fn mount_share(&self, _: Request<MountShareRequest>) -> Reply<Empty> {
        agree()
    }

    async fn events(&self, _: Request<EventsRequest>) -> Reply<Self::EventsStream> {
        let stream: Self::EventsStream = match self.0 {
            Lie::Events => Box::pin(iter(1..).map(|sequence| Ok(exit(sequence)))),
            Lie::Sequence => Box::pin(iter([1, 7, 3]).map(|sequence| Ok(exit(sequence)))),
            _ => Box::pin(pending()),
        };
        Ok(Response::new(stream))
    }

    async fn create_container(&self, _: Request<CreateContainerRequest>) -> Reply<Empty> {
        match self.0 {
            Lie::Hang => std::future::pending().await,
            Lie::Message => Err(Status::invalid_argument("\u{1b}[31mlies\n\u{7}".repeat(200))),
            _ => agree(),
        }
    }

    async fn create_exec(&self, _: Request<CreateExecRequest>) -> Reply<Empty> {
        agree()
    }

    async fn start(&self, _: Request<ProcessRef>) -> Reply<StartReply> {
        Ok(Response::new(StartReply { pid: u32::MAX }))
    }

    async fn signal(&self, _: Request<SignalRequest>) -> Reply<Empty> {
        agree()
    }

    async fn resize_pty(&self, _: Request<ResizePtyRequest>) -> Reply<Empty> {
        agree()
    }

    async fn delete(&self, _: Request<ProcessRef>) -> Reply<Empty> {
        agree()
    }

    async fn pause(&self, _: Request<ContainerRef>) -> Reply<Empty> {
        agree()
    }

    async fn resume(&self, _: Request<ContainerRef>) -> Reply<Empty> {
        agree()
    }

    async fn pids(&self, _: Request<ContainerRef>) -> Reply<PidsReply> {
        let count = if self.0 == Lie::Pids { 4 << 20 } else { 0 };
        let processes = vec![ProcessId { pid: u32::MAX, exec_id: String::new() }; count];
        Ok(Response::new(PidsReply { processes }))
    }

    async fn stats(&self, _: Request<ContainerRef>) -> Reply<StatsReply> {
        Ok(Response::new(StatsReply { memory_usage: u64::MAX, ..StatsReply::default() }))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Reply<Empty> {
        agree()
    }

    type ReadUpperStream = Pin<Box<dyn Stream<Item = Result<UpperChunk, Status>> + Send>>;

    /// Bytes without end that are no archive.
    async fn read_upper(&self, _: Request<ContainerRef>) -> Reply<Self::ReadUpperStream> {
        Ok(Response::new(Box::pin(iter(0..).map(|_: u64| Ok(UpperChunk { data: vec![b'x'; 1 << 16] })))))
    }

    type ReadMergedStream = Self::ReadUpperStream;

    /// The same.
    async fn read_merged(&self, container: Request<ContainerRef>) -> Reply<Self::ReadMergedStream> {
        self.read_upper(container).await
    }

    async fn flush(&self, _: Request<Empty>) -> Reply<Empty> {
        agree()
    }

    async fn add_union(&self, _: Request<AddUnionRequest>) -> Reply<Empty> {
        agree()
    }

    async fn flush_union(&self, _: Request<UnionRef>) -> Reply<Empty> {
        agree()
    }

    async fn remove_union(&self, _: Request<UnionRef>) -> Reply<Empty> {
        agree()
    }

    /// As an agent of an earlier release.
    async fn export_container(&self, _: Request<ContainerRef>) -> Reply<ExportContainerReply> {
        Err(Status::unimplemented(""))
    }
}
