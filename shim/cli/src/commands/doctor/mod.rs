//! `vmctr doctor`: whether this host can run containers in VMs, and what to do when it cannot.
//!
//! Every check runs, whatever the others found. One that needs what another found missing says so.

mod containerd;
mod host;
mod report;
mod vm;

use report::Check;
use vmctr_vmm::config::Config;

use super::Context;
use crate::failure::{Outcome, Verdict};
use crate::output;

/// Runs all checks and prints them.
pub async fn run(context: &Context) -> Outcome {
    let checks = checks(context).await;
    if context.json {
        output::json(&checks)?;
    } else {
        output::print_line(&report::text(&checks))?;
    }
    Ok(if report::healthy(&checks) { Verdict::Good } else { Verdict::Bad })
}

async fn checks(context: &Context) -> Vec<Check> {
    let (configuration, config) = configuration();
    let (qemu_check, qemu) = vm::qemu(&config);
    let (assets_check, assets) = vm::assets(&config);
    vec![
        host::root(),
        configuration,
        host::memory(config.vm.memory.mib().into()),
        host::fuse(),
        vm::binaries(),
        qemu_check,
        assets_check,
        vm::accelerator(&config, qemu.as_ref(), assets.as_ref()).await,
        containerd::reachable(&context.address).await,
        containerd::sees_shim(&context.address),
    ]
}

/// The defaults stand in for a configuration that cannot be used, so that the other checks can run.
fn configuration() -> (Check, Config) {
    let name = "configuration";
    match Config::load() {
        Ok(config) => (Check::ok(name, "valid"), config),
        Err(error) => (Check::error(name, error, "correct the file"), Config::default()),
    }
}
