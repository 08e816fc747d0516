//! The connection to the guest's agent: gRPC over a vsock stream. Replies, headers and waits are bounded, as
//! the guest may answer anything or nothing.

use std::fs::File;
use std::io::{self, Read as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;
use vmctr_proto::agent::agent_client::AgentClient;
use vmctr_proto::agent::{HelloReply, HelloRequest};
use vmctr_proto::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, SEED_BYTES, ports};

use super::{Agent, VmError};
use crate::vsock::VsockHost;

/// Largest reply: far above a list of a few thousand processes, far below what would hurt.
const MESSAGE_LIMIT: usize = 1024 * 1024;

/// Largest set of reply headers.
const HEADER_LIMIT: u32 = 16 * 1024;

/// How long any single call may take to begin its reply. Writing a guest's dirty pages back to the host is
/// the slowest of them.
const CALL_LIMIT: Duration = Duration::from_secs(300);

/// Connects and says hello.
pub(super) async fn greet(vsock: VsockHost) -> Result<(Agent, HelloReply), VmError> {
    let mut agent = connect(vsock).await?;
    let hello = hello(&mut agent).await?;
    Ok((agent, hello))
}

/// The returned client reconnects by itself when the stream broke.
async fn connect(vsock: VsockHost) -> Result<Agent, VmError> {
    let dial = service_fn(move |_: Uri| {
        let vsock = vsock.clone();
        async move { vsock.connect(ports::AGENT).await.map(TokioIo::new).map_err(io::Error::other) }
    });
    // The address is a placeholder: a vsock stream has none.
    let channel: Channel = Endpoint::from_static("http://agent.vmctr")
        .timeout(CALL_LIMIT)
        .http2_max_header_list_size(HEADER_LIMIT)
        .connect_with_connector(dial)
        .await
        .map_err(VmError::Connect)?;
    Ok(AgentClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT))
}

/// Settles the protocol version, makes the guest's random numbers its own and sets its clock.
pub(super) async fn hello(agent: &mut Agent) -> Result<HelloReply, VmError> {
    let request = HelloRequest {
        protocol_min: PROTOCOL_VERSION_MIN,
        protocol_max: PROTOCOL_VERSION,
        random_seed: random_seed()
            .map_err(|source| VmError::Host { action: "make a random seed", source })?,
        // Last, so that it is as late as can be.
        wall_clock_ns: wall_clock_ns(),
    };
    let reply = agent.hello(request).await.map_err(|status| VmError::Hello(Box::new(status)))?.into_inner();
    if (PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION).contains(&reply.protocol) {
        Ok(reply)
    } else {
        Err(VmError::Protocol(reply.protocol))
    }
}

fn random_seed() -> io::Result<Vec<u8>> {
    let mut seed = vec![0; SEED_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    Ok(seed)
}

fn wall_clock_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}
