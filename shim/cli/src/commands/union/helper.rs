//! The helper VM of unions: QEMU and the agent, and what they are asked for one union in one port.
//!
//! ```text
//!   plug ─ port: its share ─ add ─ overlay, export ── dial, flush ── remove ─ the port is free again
//! ```

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use tokio::task::{JoinError, spawn_blocking};
use tokio::time::timeout;
use tonic::Status;
use tracing::error;
use vmctr_fileshare::export::wire::stream::Stream;
use vmctr_proto::agent::{AddUnionRequest, HostUpper, Overlay, UnionRef, overlay};
use vmctr_proto::{guest_paths, ports};
use vmctr_vmm::accel::{self, AccelError};
use vmctr_vmm::assets::{AssetError, GuestAssets};
use vmctr_vmm::config::Config;
use vmctr_vmm::error_chain;
use vmctr_vmm::origin::{Machine, Origins};
use vmctr_vmm::qemu::{Qemu, QemuError};
use vmctr_vmm::run_dir::RunDir;
use vmctr_vmm::spec::{Host, Limits, SpecError, VmSpec};
use vmctr_vmm::vm::{Origin, Vm, VmError, VmStart};

use super::check::Plan;

/// A restored VM that takes longer is given up for one that boots.
const RESTORE_LIMIT: Duration = Duration::from_secs(20);
const MOUNT_LIMIT: Duration = Duration::from_secs(60);
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// Writing a guest's dirty pages back to the host.
const FLUSH_LIMIT: Duration = Duration::from_secs(300);
/// Unmounting what nobody uses any more; the agent gives up earlier.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// Of what the guest says, this much is passed on.
const MAX_TEXT: usize = 1024;

/// A VM for unions.
#[derive(Debug)]
pub struct Helper(Vm);

/// The VM does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The configuration's VM cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The guest's kernel or initramfs cannot be used.
    #[error(transparent)]
    Assets(#[from] AssetError),
    /// QEMU cannot be used.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// No accelerator can be chosen.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// The VM does not start.
    #[error("Cannot start the VM")]
    Vm(#[from] VmError),
    /// A thread of ours is gone.
    #[error("A thread that starts the VM is gone")]
    Thread(#[from] JoinError),
    /// The agent refused or failed.
    #[error("The guest did not {what}: {text}")]
    Refused {
        /// The call, as a verb.
        what: &'static str,
        /// The guest's words, cleaned.
        text: String,
    },
    /// The agent did not answer.
    #[error("The guest did not {what} within {} s", limit.as_secs())]
    Timeout {
        /// The call, as a verb.
        what: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// No stream to the guest.
    #[error("Cannot open a stream to the guest")]
    Stream(#[source] io::Error),
}

impl Helper {
    /// Starts the VM, without any union. On an error nothing is left.
    pub async fn start(config: &Config, run_dir: &RunDir) -> Result<Self, HelperError> {
        let spec = VmSpec::resolve(&config.vm, &Limits::default(), &HashMap::new(), &Host::detect())?;
        let found = config.clone();
        let found = spawn_blocking(move || {
            Ok::<_, HelperError>((GuestAssets::find(&found)?, Qemu::find_known(&found)?))
        });
        let (assets, qemu) = found.await??;
        let accelerator = accel::resolve(config, &assets, &qemu).await?.accelerator;
        let machine = Machine { spec, assets, qemu, accelerator };
        let origins = Origins::find(config, config.vm.start, machine.clone()).await;
        let vm = match Vm::start(order(config, &machine, run_dir, origins.first())).await {
            Err(error) if origins.is_template() => {
                origins.discard(&error).await;
                Vm::start(order(config, &machine, run_dir, origins.boot())).await?
            }
            started => started?,
        };
        origins.make_template_later();
        Ok(Self(vm))
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.0
    }

    /// Has the guest make the union whose share is in this port, and serve it under the port's number.
    pub async fn add(&self, plan: &Plan, port: u32) -> Result<(), HelperError> {
        let request = AddUnionRequest { port, overlay: Some(guest_overlay(plan)) };
        let mut agent = self.0.agent();
        call("make the union", MOUNT_LIMIT, agent.add_union(request)).await
    }

    /// A stream to the guest's exports, and a handle that closes it.
    pub async fn dial(&self) -> Result<(Stream, OwnedFd), HelperError> {
        let dialled = timeout(DIAL_LIMIT, self.0.vsock().connect(ports::EXPORT)).await;
        let late = || HelperError::Stream(io::ErrorKind::TimedOut.into());
        let stream =
            dialled.map_err(|_| late())?.map_err(|error| HelperError::Stream(io::Error::other(error)))?;
        let stream = stream.into_std().map_err(HelperError::Stream)?;
        let handle = stream.as_fd().try_clone_to_owned().map_err(HelperError::Stream)?;
        Ok((Stream::from(stream), handle))
    }

    /// Brings all that the guest has of a union to the host's disks.
    pub async fn flush(&self, port: u32) -> Result<(), HelperError> {
        let mut agent = self.0.agent();
        call("write its changes to disk", FLUSH_LIMIT, agent.flush_union(UnionRef { port })).await
    }

    /// Has the guest end a union, and takes its share out of the port.
    pub async fn remove(&self, port: u32) -> Result<(), HelperError> {
        let mut agent = self.0.agent();
        call("let the union go", REMOVE_LIMIT, agent.remove_union(UnionRef { port })).await?;
        Ok(self.0.unplug_union(port).await?)
    }

    /// Ends the VM. What fails is logged: nobody is left who could do better.
    pub async fn stop(&self) {
        if let Err(error) = self.0.stop().await {
            error!("Cannot stop the VM: {}", error_chain(&error));
        }
    }
}

fn order(config: &Config, machine: &Machine, run_dir: &RunDir, origin: Origin) -> VmStart {
    let limit = config.vm.boot_timeout_seconds.duration();
    let boot_timeout = match origin {
        Origin::Boot(_) => limit,
        Origin::Template(_) => limit.min(RESTORE_LIMIT),
    };
    VmStart {
        spec: machine.spec,
        origin,
        qemu: machine.qemu.clone(),
        accelerator: machine.accelerator,
        run_dir: run_dir.clone(),
        jail: config.jail.clone(),
        share: None,
        share_later: false,
        boot_timeout,
    }
}

async fn call<T>(
    what: &'static str,
    limit: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<(), HelperError> {
    match timeout(limit, call).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) => Err(HelperError::Refused { what, text: clean(status.message()) }),
        Err(_) => Err(HelperError::Timeout { what, limit }),
    }
}

/// Text of the guest's, fit for logs and terminals.
fn clean(text: &str) -> String {
    text.chars().take(MAX_TEXT).map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

fn guest_overlay(plan: &Plan) -> Overlay {
    let host = || HostUpper { upper: guest_paths::UPPER.into(), work: guest_paths::WORK.into() };
    Overlay {
        lowers: (0..plan.lowers.len()).map(guest_paths::lower).collect(),
        upper: plan.top.as_ref().map(|_| overlay::Upper::Host(host())),
    }
}
