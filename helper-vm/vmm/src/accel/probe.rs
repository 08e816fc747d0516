//! The real boot that decides whether KVM works here.

use super::{Accelerator, PROBE_LIMIT, Resolution, tcg};
use crate::assets::GuestAssets;
use crate::config::Config;
use crate::error_chain::error_chain;
use crate::qemu::Qemu;
use crate::run_dir::{Owner, RunDir};
use crate::spec::VmSpec;
use crate::vm::{Vm, VmError, VmStart};

/// Boots the smallest VM under KVM and ends it again. Nothing is left running, whatever the answer.
pub(super) async fn probe(config: &Config, assets: &GuestAssets, qemu: &Qemu) -> Resolution {
    match boot(config, assets, qemu).await {
        Ok(()) => Resolution {
            accelerator: Accelerator::Kvm,
            reason: "the guest kernel booted under KVM on this host".to_owned(),
        },
        Err(cause) => tcg(format!("the guest kernel does not boot under KVM on this host: {cause}")),
    }
}

async fn boot(config: &Config, assets: &GuestAssets, qemu: &Qemu) -> Result<(), String> {
    // One fixed name: the lock admits one probe at a time, and the next one removes what a killed one left.
    let owner = Owner {
        namespace: "vmctr".to_owned(),
        container_id: "accelerator-probe".to_owned(),
        bundle: config.run_dir.join("accelerator-probe"),
    };
    let run_dir = RunDir::create(&config.run_dir, owner).map_err(|error| error_chain(&error))?;
    let booted = start_and_stop(config, assets, qemu, run_dir.clone()).await;
    let removed = run_dir.remove();
    booted.map_err(|error| error_chain(&error)).and(removed.map_err(|error| error_chain(&error)))
}

async fn start_and_stop(
    config: &Config,
    assets: &GuestAssets,
    qemu: &Qemu,
    run_dir: RunDir,
) -> Result<(), VmError> {
    let start = VmStart {
        spec: VmSpec::smallest(config.vm.machine),
        assets: assets.clone(),
        qemu: qemu.clone(),
        accelerator: Accelerator::Kvm,
        run_dir,
        jail: config.jail.clone(),
        share: None,
        boot_timeout: PROBE_LIMIT,
    };
    Vm::start(start).await?.stop().await
}
