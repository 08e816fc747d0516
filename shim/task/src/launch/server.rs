//! The shim proper: one process per container, from its start until containerd's shutdown request.
//!
//! ```text
//!   log -> listen -> publisher, driver, task service -> "ready" (the pipe of `start` closes)
//!   ... shutdown request, or SIGTERM: the driver ends
//!   last events -> connections -> socket
//! ```

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim::Flags;
use containerd_shim::protos::shim_async::create_task;
use containerd_shim::protos::ttrpc::asynchronous::Server;
use containerd_shim::protos::ttrpc::asynchronous::transport::Listener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{info, warn};
use vmctr_vmm::config::Config;

use super::{remove_socket, socket_path};
use crate::events;
use crate::log;
use crate::sandbox::{self, Handle, Identity, Warm};
use crate::service::Service;
use crate::sys;

/// Name of the task service in containerd 1.6 and 1.7.
const TASK_V2: &str = "containerd.task.v2.Task";

/// For the reply to the request that ended the driver to leave.
const REPLY_GRACE: Duration = Duration::from_millis(100);

/// For containerd to take the last events.
const EVENTS_LIMIT: Duration = Duration::from_secs(5);

/// Serves until it is over. The working directory is the bundle; `address` is containerd's for events.
pub async fn run(flags: &Flags, address: &str, warm: Option<Warm>) -> Result<()> {
    let mut config = Config::load()?;
    if flags.debug {
        config.log.level = vmctr_vmm::config::LogLevel::Debug;
    }
    log::start(config.log.level.as_str(), &flags.id, &flags.namespace).context("open the log")?;
    let path = socket_path(&flags.socket);
    let listener = listen(path).with_context(|| format!("listen on {}", path.display()))?;
    let (publisher, sender) = events::spawn(address, &flags.namespace);
    let identity = Identity {
        namespace: flags.namespace.clone(),
        container_id: flags.id.clone(),
        config: Arc::new(config),
        publisher,
    };
    let (handle, driver) = sandbox::spawn(identity, warm);
    let mut server = serve(listener, Service::new(flags.id.clone(), handle.clone())).await?;
    sys::close_stdout_and_stderr().context("detach from containerd")?;
    info!(pid = std::process::id(), "Shim started");

    wait(handle, driver).await?;
    sender.finish(EVENTS_LIMIT).await;
    sleep(REPLY_GRACE).await;
    if let Err(error) = server.shutdown().await {
        warn!("Cannot close connections: {error}");
    }
    info!("Shim ends");
    remove_socket(path).with_context(|| format!("remove {}", path.display()))
}

/// A socket that nobody serves is left over from a killed shim.
fn listen(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                bail!("a shim of this container runs already");
            }
            remove_socket(path)?;
            Ok(UnixListener::bind(path)?)
        }
        bound => Ok(bound?),
    }
}

async fn serve(listener: UnixListener, service: Service) -> Result<Server> {
    listener.set_nonblocking(true).context("listen")?;
    let listener = Listener::try_from(listener).context("listen")?;
    let service = Arc::new(service);
    let v3 = create_task(service.clone());
    let v2 = create_task(service).into_values().map(|methods| (TASK_V2.to_owned(), methods)).collect();
    let mut server = Server::new().add_listener(listener).register_service(v3).register_service(v2);
    server.start().await.context("serve")?;
    Ok(server)
}

/// Returns when the driver has ended.
async fn wait(handle: Handle, mut driver: JoinHandle<()>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    tokio::select! {
        ended = &mut driver => return ended.context("the driver broke down"),
        _ = terminate.recv() => info!("SIGTERM"),
        _ = interrupt.recv() => info!("SIGINT"),
    }
    handle.terminate().await;
    driver.await.context("the driver broke down")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_is_served_is_left_alone_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        let first = listen(&path).unwrap();
        assert!(listen(&path).unwrap_err().to_string().contains("runs already"));
        drop(first);
        let _second = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }
}
