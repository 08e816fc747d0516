//! The real boot that decides whether KVM works here.

use super::{Accelerator, PROBE_LIMIT, Resolution, tcg};
use crate::assets::GuestAssets;
use crate::config::Config;
use crate::error_chain::error_chain;
use crate::qemu::Qemu;
use crate::run_dir::{Owner, RunDir};
use crate::spec::VmSpec;
use crate::vm::{Origin, Vm, VmError, VmStart};

/// Boots the smallest VM under KVM and ends it again. Nothing is left running, whatever the answer.
pub(super) async fn probe(config: &Config, assets: &GuestAssets, qemu: &Qemu) -> Result<Resolution, VmError> {
    // One fixed name: the lock admits one probe at a time, and the next one removes what a killed one left.
    let owner = Owner {
        namespace: "vmctr".to_owned(),
        container_id: "accelerator-probe".to_owned(),
        bundle: config.run_dir.join("accelerator-probe"),
    };
    let run_dir = RunDir::create(&config.run_dir, owner)?;
    let booted = start_and_stop(config, assets, qemu, run_dir.clone()).await;
    run_dir.remove()?;
    answer(booted)
}

fn answer(booted: Result<(), VmError>) -> Result<Resolution, VmError> {
    match booted {
        Ok(()) => Ok(Resolution {
            accelerator: Accelerator::Kvm,
            reason: "the guest kernel booted under KVM on this host".to_owned(),
        }),
        Err(error) if error.is_the_hosts() => Err(error),
        Err(error) => {
            let cause = error_chain(&error);
            Ok(tcg(format!("the guest kernel does not boot under KVM on this host: {cause}")))
        }
    }
}

async fn start_and_stop(
    config: &Config,
    assets: &GuestAssets,
    qemu: &Qemu,
    run_dir: RunDir,
) -> Result<(), VmError> {
    let start = VmStart {
        spec: VmSpec::smallest(config.vm.machine),
        origin: Origin::Boot(Box::new(assets.clone())),
        qemu: qemu.clone(),
        accelerator: Accelerator::Kvm,
        run_dir,
        jail: config.jail.clone(),
        share: None,
        share_later: false,
        boot_timeout: PROBE_LIMIT,
    };
    Vm::start(start).await?.stop().await
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::vm::Phase;

    #[test]
    fn only_a_guest_that_does_not_boot_speaks_against_kvm() {
        assert_eq!(answer(Ok(())).unwrap().accelerator, Accelerator::Kvm);
        let late = VmError::TimeLimit { phase: Phase::Boot, limit: PROBE_LIMIT, last_words: None };
        let resolution = answer(Err(late)).unwrap();
        assert_eq!(resolution.accelerator, Accelerator::Tcg);
        assert!(
            resolution.reason.ends_with("Waited 10 s in vain for the guest to boot"),
            "{}",
            resolution.reason
        );
        assert!(answer(Err(VmError::Jail("cannot bind /usr".into()))).is_err());
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert!(answer(Err(VmError::Host { action: "make a socket pair", source: full })).is_err());
    }
}
