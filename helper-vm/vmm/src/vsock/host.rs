//! The host's handle on a VM's vsock device, and the thread that watches over its life.
//!
//! ```text
//!   spawn ── supervisor: waits for QEMU ── runs the back-end ── QEMU goes away ── closes all, ends
//!                 └── last handle dropped before QEMU came ───────────────────────────┘
//! ```
//!
//! When the supervisor ends, the worker has ended, every socket is closed (users read the end of file),
//! pending connects and accepts have failed, and later ones fail at once. Dropping the handle while QEMU
//! runs changes nothing for open connections.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tokio::sync::oneshot;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmctr_proto::GuestCid;
use vmm_sys_util::epoll::EventSet;

use super::connection::Opening;
use super::device::{Device, POLLER};
use super::error::{ConnectError, ListenError, SpawnError};
use super::inbox::Inbox;
use super::listen::{Listener, Listeners};
use super::mux::{Connect, Mux, nonblocking_pair};
use super::poller::Poller;
use super::unix::UnixServer;

/// A VM's vsock device as the host sees it. Clones are the same device.
#[derive(Clone, Debug)]
pub struct VsockHost(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    poller: Arc<Poller>,
    inbox: Arc<Inbox>,
    listeners: Arc<Listeners>,
    /// An eventfd: the supervisor need not wait for QEMU any more.
    stop: Arc<OwnedFd>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Fails only when the counter is full; it is written once.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
    }
}

impl VsockHost {
    /// Starts a device for one VM. QEMU connects to `listener`, once; the device ends when QEMU does.
    ///
    /// # Errors
    /// When the process lacks descriptors or threads.
    pub fn spawn(guest: GuestCid, listener: UnixListener) -> Result<Self, SpawnError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| SpawnError::Events(e.into()))?;
        let handle = Handle {
            poller: Arc::new(Poller::new().map_err(SpawnError::Events)?),
            inbox: Arc::default(),
            listeners: Arc::default(),
            stop: Arc::new(stop),
        };
        let supervisor = Supervisor::new(guest, listener, &handle)?;
        thread::Builder::new()
            .name("vsock".into())
            .spawn(move || supervisor.run())
            .map_err(SpawnError::Thread)?;
        Ok(Self(Arc::new(handle)))
    }

    /// Connects to a port in the guest. Waits till the guest's driver is up and its answer is there: the
    /// caller limits the time. Dropping the future takes the connect back.
    ///
    /// # Errors
    /// When the guest refuses, the VM ends, or the host is out of descriptors or connections.
    pub async fn connect(&self, port: u32) -> Result<tokio::net::UnixStream, ConnectError> {
        let (device, user) = nonblocking_pair().map_err(ConnectError::Socket)?;
        self.open(port, device, false).await?;
        tokio::net::UnixStream::from_std(user).map_err(ConnectError::Socket)
    }

    /// Takes connections that the guest makes to a port of the host; without a listener they are refused.
    ///
    /// # Errors
    /// When the port has a listener already, or the VM has ended.
    pub fn listen(&self, port: u32) -> Result<Listener, ListenError> {
        self.0.listeners.listen(port)
    }

    /// Serves the `CONNECT <port>` convention on a unix socket at `path` for as long as the result lives.
    ///
    /// # Errors
    /// When the socket cannot be made there.
    pub fn serve_unix(&self, path: &Path) -> io::Result<UnixServer> {
        UnixServer::bind(self.clone(), path)
    }

    /// Connects `device`, the nonblocking end of a stream socket, to a port in the guest. With `greet`, the
    /// socket's other end first reads `OK <host port>`. Gives the host port.
    pub(super) async fn open(&self, port: u32, device: UnixStream, greet: bool) -> Result<u32, ConnectError> {
        let (reply, answer) = oneshot::channel();
        self.0.inbox.put(Connect { port, local: device, opening: Opening { reply, greet } });
        self.0.poller.wake();
        answer.await.unwrap_or(Err(ConnectError::Gone(port)))
    }
}

/// Owns the back-end.
struct Supervisor {
    daemon: VhostUserDaemon<Arc<Device>>,
    listener: UnixListener,
    poller: Arc<Poller>,
    inbox: Arc<Inbox>,
    listeners: Arc<Listeners>,
    stop: Arc<OwnedFd>,
}

impl Supervisor {
    fn new(guest: GuestCid, listener: UnixListener, handle: &Handle) -> Result<Self, SpawnError> {
        let Handle { poller, inbox, listeners, stop } = handle;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mux = Mux::new(guest, Arc::clone(poller), Arc::clone(listeners));
        let device = Device::new(guest, mux, memory.clone(), Arc::clone(poller), Arc::clone(inbox));
        let daemon = VhostUserDaemon::new("vsock-requests".into(), Arc::new(device), memory)
            .map_err(|e| SpawnError::Backend(e.to_string()))?;
        for worker in daemon.get_epoll_handlers() {
            worker
                .register_listener(poller.as_fd().as_raw_fd(), EventSet::IN, POLLER)
                .map_err(SpawnError::Events)?;
        }
        Ok(Self {
            daemon,
            listener,
            poller: Arc::clone(poller),
            inbox: Arc::clone(inbox),
            listeners: Arc::clone(listeners),
            stop: Arc::clone(stop),
        })
    }

    fn run(mut self) {
        if self.qemu_comes() {
            self.serve();
        }
    }

    /// Waits for QEMU's connection; false when nobody needs the device any more.
    fn qemu_comes(&self) -> bool {
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&*self.stop, PollFlags::IN)];
        while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
        fds[0].revents().contains(PollFlags::IN)
    }

    fn serve(&mut self) {
        let served = self.listener.try_clone().map_err(|e| e.to_string()).and_then(|listener| {
            self.daemon.start(&mut listener.into()).map_err(|e| e.to_string())?;
            self.daemon.wait().map_err(|e| e.to_string())
        });
        // QEMU ends without a good-bye, so every end is an error here.
        tracing::debug!(end = ?served.err(), "the vsock device's VM is gone");
    }
}

impl Drop for Supervisor {
    /// Ends the worker, which the back-end's own drop then joins.
    fn drop(&mut self) {
        self.inbox.close();
        self.listeners.close();
        self.poller.wake();
    }
}
