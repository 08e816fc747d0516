//! A running VM: QEMU in its jail, the vsock device in this process, the agent in the guest.
//!
//! ```text
//!                                    agent connects      agent answers
//!                                    to READY            Hello             pause()
//!   Spec ──> Starting ─────────────────> Ready ─────────────> Running <───────────> Paused
//!                │                          │                    │       resume()     │
//!                └──────────────┬───────────┴────────────────────┴────────────────────┘
//!                               ├──> Stopped           stop(), or every handle dropped
//!                               └──> Failed(reason)    QEMU gone, time limit, protocol broken
//! ```
//!
//! One driver task per VM owns the state, QEMU's process and its QMP connection; a [`Vm`] is a handle that
//! sends it requests. A start that fails, and a future of [`Vm::start`] that is dropped, leave nothing
//! running.

mod agent;
mod attempt;
mod boot;
mod driver;
mod error;
mod launch;
mod qemu_process;
mod state;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::Channel;
use tracing::Instrument as _;
use vmctr_proto::agent::HelloReply;
use vmctr_proto::agent::agent_client::AgentClient;

pub(crate) use attempt::Attempt;
pub use error::{Phase, VmError};
pub(crate) use launch::{Job, Launch, boot_files};
pub use state::{InvalidMove, VmState};

use crate::accel::Accelerator;
use crate::assets::GuestAssets;
use crate::config::JailConfig;
use crate::qemu::{Qemu, command};
use crate::run_dir::RunDir;
use crate::spec::VmSpec;
use crate::template::Template;
use crate::vsock::VsockHost;
use driver::{Driver, Request};

/// The agent's client. Clones share one connection; replies and waits are bounded.
pub type Agent = AgentClient<Channel>;

/// Where the guest comes from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// It boots this kernel and initramfs.
    Boot(Box<GuestAssets>),
    /// It goes on where this template was saved, which must be for the very same machine.
    Template(Arc<Template>),
}

/// What [`Vm::start`] needs.
#[derive(Debug)]
pub struct VmStart {
    /// The machine.
    pub spec: VmSpec,
    /// Where its guest comes from.
    pub origin: Origin,
    /// The program that runs it.
    pub qemu: Qemu,
    /// See [`crate::accel::resolve`].
    pub accelerator: Accelerator,
    /// Where the VM's files go; its owner removes it after [`Vm::stop`].
    pub run_dir: RunDir,
    /// How QEMU is confined.
    pub jail: JailConfig,
    /// Connected vhost-user socket of the share daemon; the guest sees a virtiofs device with the tag
    /// [`vmctr_proto::guest_paths::SHARE_TAG`].
    pub share: Option<OwnedFd>,
    /// A restored VM goes on without the share, until [`Vm::plug_share`].
    pub share_later: bool,
    /// From QEMU's start until the agent answered.
    pub boot_timeout: Duration,
}

/// How long one phase of the start took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhaseTime {
    /// The phase.
    pub phase: Phase,
    /// Its duration.
    pub duration: Duration,
}

/// A VM that was started. Clones are handles to the same one; when the last is dropped, the VM is stopped.
#[derive(Clone, Debug)]
pub struct Vm {
    requests: mpsc::Sender<Request>,
    state: watch::Receiver<VmState>,
    started: Arc<Started>,
}

/// What is known and does not change once the VM runs.
#[derive(Debug)]
struct Started {
    spec: VmSpec,
    accelerator: Accelerator,
    qemu_pid: u32,
    vsock: VsockHost,
    agent: Agent,
    hello: HelloReply,
    phases: Vec<PhaseTime>,
}

impl Vm {
    /// Starts a VM and waits until its agent answered. Needs a tokio runtime.
    ///
    /// # Errors
    /// Names the phase that failed, the cause and, where there is one, what QEMU and the guest last said.
    /// Nothing is left running then.
    pub async fn start(start: VmStart) -> Result<Self, VmError> {
        let (state_sender, state) = watch::channel(VmState::Spec);
        let (requests, request_queue) = mpsc::channel(driver::QUEUE);
        let (started_sender, started) = oneshot::channel();
        let driver = Driver::new(state_sender, request_queue);
        tokio::spawn(driver.run(start, started_sender).in_current_span());
        let started = started.await.map_err(|_| VmError::DriverGone)??;
        Ok(Self { requests, state, started: Arc::new(started) })
    }

    /// The state now and its changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<VmState> {
        self.state.clone()
    }

    /// Waits until the VM is [`VmState::Stopped`] or [`VmState::Failed`], and returns which.
    pub async fn ended(&self) -> VmState {
        let mut state = self.state.clone();
        match state.wait_for(VmState::is_final).await {
            Ok(state) => state.clone(),
            Err(_) => VmState::Failed(VmError::DriverGone.to_string()),
        }
    }

    /// Streams to and from the guest.
    #[must_use]
    pub fn vsock(&self) -> &VsockHost {
        &self.started.vsock
    }

    /// A client of the guest's agent.
    #[must_use]
    pub fn agent(&self) -> Agent {
        self.started.agent.clone()
    }

    /// What the agent said of itself.
    #[must_use]
    pub fn hello(&self) -> &HelloReply {
        &self.started.hello
    }

    /// The machine.
    #[must_use]
    pub fn spec(&self) -> &VmSpec {
        &self.started.spec
    }

    /// What runs it.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.started.accelerator
    }

    /// QEMU's process ID.
    #[must_use]
    pub fn qemu_pid(&self) -> u32 {
        self.started.qemu_pid
    }

    /// The start's phases in order.
    #[must_use]
    pub fn phases(&self) -> &[PhaseTime] {
        &self.started.phases
    }

    /// Stops the guest's CPUs.
    ///
    /// # Errors
    /// Not running, or QEMU does not obey.
    pub async fn pause(&self) -> Result<(), VmError> {
        self.request(Request::Pause).await
    }

    /// Lets the guest's CPUs run again and tells the guest how late it is.
    ///
    /// # Errors
    /// Not paused, QEMU does not obey, or the guest does not take the time and the seed: it runs then, with a clock
    /// that is late.
    pub async fn resume(&self) -> Result<(), VmError> {
        self.request(Request::Resume).await
    }

    /// Gives a VM whose share was to come later that share. Its daemon must be serving, or about to.
    ///
    /// # Errors
    /// QEMU does not obey.
    pub async fn plug_share(&self) -> Result<(), VmError> {
        self.request(Request::PlugShare).await
    }

    /// How many unions the VM can have at the same time.
    #[must_use]
    pub fn union_ports(&self) -> u32 {
        command::union_ports(self.spec().machine())
    }

    /// Plugs the share of a union into a port, which must be free. `share` is the connected vhost-user socket of its
    /// daemon, which must be serving.
    ///
    /// # Errors
    /// QEMU does not obey; the port is free then.
    pub async fn plug_union(&self, port: u32, share: OwnedFd) -> Result<(), VmError> {
        self.request(|answer| Request::PlugUnion(port, share, answer)).await
    }

    /// Waits until the share of a union that the agent has removed is out of its port.
    ///
    /// # Errors
    /// QEMU still has it: the port cannot be used again.
    pub async fn unplug_union(&self, port: u32) -> Result<(), VmError> {
        self.request(|answer| Request::UnplugUnion(port, answer)).await
    }

    /// Ends the VM at once, as a power cut would; returns when QEMU is reaped and its files are removed.
    /// Stopping a VM that has ended does nothing.
    ///
    /// # Errors
    /// QEMU cannot be killed.
    pub async fn stop(&self) -> Result<(), VmError> {
        self.request(Request::Stop).await
    }

    async fn request(&self, make: impl FnOnce(driver::Answer) -> Request) -> Result<(), VmError> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(make(answer)).await.map_err(|_| VmError::DriverGone)?;
        answered.await.map_err(|_| VmError::DriverGone)?
    }
}
