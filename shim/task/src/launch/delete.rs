//! `delete`: containerd has lost the shim. Removes everything that it left and prints how the container ended.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use containerd_shim::Flags;
use containerd_shim::protos::protobuf::Message;
use vmctr_images::root::{UpperChoice, work_dir};
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::{self, Role, RunKey};

use super::{address_file, remove_socket, socket_path};
use crate::annotations::upper_choice;
use crate::error::chain;
use crate::hooks::{self, Moment, State};
use crate::oci::OciSpec;
use crate::sandbox::{Deleted, Exit, WorkDir};
use crate::service::delete_response;

/// Exit status of a container that nobody could watch any more: as if killed.
const STATUS_KILLED: u32 = 137;

/// Does it all. Doing it twice does no harm.
pub async fn run(flags: &Flags) -> Result<()> {
    let config = Config::load()?;
    let bundle = bundle(flags)?;
    let key = RunKey::of_bundle(&bundle);
    let pid = qemu_pid(&config.run_dir, &key);
    let cleaned = run_dir::cleanup(&config.run_dir, &key);
    let existed = cleaned.as_ref().is_ok_and(|cleaned| cleaned.removed);
    clean_bundle(flags, &bundle, existed).await;
    cleaned.context("clean up after the container")?;
    let exit = Exit { status: STATUS_KILLED, at: SystemTime::now() };
    let response = delete_response(Deleted { pid, exit });
    let message = response.write_to_bytes().context("encode the reply")?;
    stdout().write_all(&message).context("write the reply")
}

/// As `create` was told it: the key of the run directory depends on it.
fn bundle(flags: &Flags) -> Result<PathBuf> {
    if flags.bundle.is_empty() {
        return std::env::current_dir().context("find the bundle");
    }
    Ok(PathBuf::from(&flags.bundle))
}

/// Before the clean-up forgets it.
fn qemu_pid(run_dir: &Path, key: &RunKey) -> u32 {
    let entry = run_dir::Entry::open(run_dir, key).ok().flatten();
    let qemu =
        entry.and_then(|entry| entry.meta.processes.into_iter().find(|process| process.role == Role::Qemu));
    qemu.map_or(0, |qemu| qemu.pid)
}

/// What lies outside the run directory. Nothing of it keeps containerd from forgetting the container, so what
/// fails is told and passed over. The hooks of a container that never `existed` do not run.
async fn clean_bundle(flags: &Flags, bundle: &Path, existed: bool) {
    if let Ok(address) = std::fs::read_to_string(address_file(bundle)) {
        complain(remove_socket(socket_path(&address)));
    }
    // Without a spec there was no container.
    let Ok(spec) = OciSpec::load(bundle) else { return };
    let annotations = spec.annotations();
    if let Ok(UpperChoice::HostDir(upper)) = upper_choice(&annotations) {
        complain(WorkDir::remove_stale(&work_dir(&upper)));
    }
    if !existed {
        return;
    }
    let state = State {
        oci_version: spec.version().to_owned(),
        id: flags.id.clone(),
        status: "stopped",
        pid: None,
        bundle: bundle.to_owned(),
        annotations,
    };
    hooks::run_all(&spec.hooks(), Moment::PostStop, &state).await;
}

fn complain<E: std::error::Error>(result: Result<(), E>) {
    if let Err(error) = result {
        // Only standard error: standard output is containerd's.
        eprintln!("{}", chain(&error));
    }
}
