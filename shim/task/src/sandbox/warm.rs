//! A VM that waits for its container: restored, greeted, rehearsed, paused.
//!
//! It has its vsock device and a connection for its share, but no share daemon: what is to be shared only the
//! container tells. While it waits its CPUs stand still, so it costs memory and nothing else. When it goes on, it
//! gets a seed and the time once more.

use anyhow::{Context, Result};
use tokio::time::timeout;
use tracing::error;
use vmctr_fileshare::share::Connection;
use vmctr_proto::agent::Empty;
use vmctr_vmm::accel;
use vmctr_vmm::assets::GuestAssets;
use vmctr_vmm::config::Config;
use vmctr_vmm::qemu::Qemu;
use vmctr_vmm::run_dir::{Owner, RunDir};
use vmctr_vmm::spec::{Host, Limits, VmSpec};
use vmctr_vmm::template::{Key, Maker, Store, make_or_wait};
use vmctr_vmm::vm::{Origin, Vm, VmStart};

use super::container::CREATE_LIMIT;
use crate::error::chain;

/// The VM and what else is its own while it waits.
#[derive(Debug)]
pub struct Warm {
    vm: Vm,
    key: Key,
    connection: Connection,
    remains: Remains,
}

/// The run directory that the VM had while it waited; dropping it removes it.
#[derive(Debug)]
pub struct Remains(RunDir);

impl Drop for Remains {
    fn drop(&mut self) {
        // The container has a directory of its own.
        if let Err(error) = self.0.remove() {
            error!("{}", chain(&error));
        }
    }
}

impl Warm {
    /// Starts a VM of the default size from its template, which is made if it is missing, and lets it wait. On an
    /// error nothing is left.
    pub async fn start(config: &Config) -> Result<Self> {
        let me = std::process::id();
        let owner = Owner {
            namespace: "vmctr".to_owned(),
            container_id: format!("pool-{me}"),
            bundle: config.run_dir.join(format!("pool-{me}")),
        };
        let remains = Remains(RunDir::create(&config.run_dir, owner)?);
        let (vm, key, connection) = Self::start_in(config, &remains.0).await?;
        Ok(Self { vm, key, connection, remains })
    }

    async fn start_in(config: &Config, run_dir: &RunDir) -> Result<(Vm, Key, Connection)> {
        let (assets, qemu) = (GuestAssets::find(config)?, Qemu::find_known(config)?);
        let accelerator = accel::resolve(config, &assets, &qemu).await?.accelerator;
        let none = std::collections::HashMap::<String, String>::new();
        let maker = Maker {
            spec: VmSpec::resolve(&config.vm, &Limits::default(), &none, &Host::detect())?,
            assets,
            qemu,
            accelerator,
            jail: config.jail.clone(),
            boot_timeout: config.vm.boot_timeout_seconds.duration(),
        };
        let store = Store::new(config);
        // Other members of a new pool want the same one.
        let key = make_or_wait(&maker, &store).await?;
        let template = store.open(&key)?.context("the template is gone")?;
        let mut connection = Connection::new(run_dir.path())?;
        let start = VmStart {
            spec: maker.spec,
            origin: Origin::Template(template.into()),
            qemu: maker.qemu,
            accelerator,
            run_dir: run_dir.clone(),
            jail: maker.jail,
            share: connection.socket.take(),
            share_later: true,
            boot_timeout: maker.boot_timeout,
        };
        let vm = Vm::start(start).await?;
        // Dropping the VM on an error ends it.
        let mut agent = vm.agent();
        timeout(CREATE_LIMIT, agent.rehearse(Empty {})).await.context("the rehearsal takes too long")??;
        vm.pause().await?;
        Ok((vm, key, connection))
    }

    /// The template that it was restored from.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The VM, to watch it.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// For its container.
    pub fn split(self) -> (Vm, Connection, Remains) {
        (self.vm, self.connection, self.remains)
    }

    /// Nobody wants it.
    pub async fn discard(self) {
        if let Err(error) = self.vm.stop().await {
            error!("Cannot stop the VM: {}", chain(&error));
        }
    }
}
