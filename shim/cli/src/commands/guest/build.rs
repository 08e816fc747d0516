//! `vmctr guest build`: makes the guest's kernel image and initramfs.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use vmctr_guest::{BuildRequest, KernelSource};

use super::super::Context;
use super::package::Download;
use super::view;
use crate::cli::GuestBuild;
use crate::failure::{Failure, Outcome, Verdict};

/// The guest's PID 1, as built.
const AGENT: &str = "vmctr-agent";

/// Builds and prints what was built.
pub fn run(context: &Context, args: GuestBuild) -> Outcome {
    let agent = args.agent.map_or_else(agent_beside, Ok)?;
    for named in [&agent].into_iter().chain(&args.deb).chain(&args.kernel).chain(&args.modules) {
        must_exist(named)?;
    }
    let (kernel, _download) = kernel(args.deb, args.kernel.zip(args.modules))?;
    let request = BuildRequest { kernel, agent, out: args.out };
    let manifest = vmctr_guest::build(&request)?;
    view::print(context, &request.out, &manifest)?;
    Ok(Verdict::Good)
}

/// The kernel that the arguments name, else a downloaded package, which lives as long as the second value.
fn kernel(
    deb: Option<PathBuf>,
    files: Option<(PathBuf, PathBuf)>,
) -> Result<(KernelSource, Option<Download>), Failure> {
    if let Some(deb) = deb {
        return Ok((KernelSource::Deb(deb), None));
    }
    if let Some((vmlinuz, modules)) = files {
        return Ok((KernelSource::Files { vmlinuz, modules }, None));
    }
    let download = Download::cloud_kernel().map_err(|error| {
        Failure::failed(error).hint(
            "name a package with --deb, or a kernel with --kernel and --modules; \
             `apt-get update` where apt knows of no package",
        )
    })?;
    Ok((KernelSource::Deb(download.deb().to_owned()), Some(download)))
}

fn must_exist(path: &Path) -> Result<(), Failure> {
    match path.metadata() {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::not_found(
            anyhow::Error::from(error).context(format!("Cannot use {}", path.display())),
        )),
    }
}

fn agent_beside() -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe()
        .context("Cannot tell where this program lies; name the agent with --agent")?;
    Ok(me.with_file_name(AGENT))
}
