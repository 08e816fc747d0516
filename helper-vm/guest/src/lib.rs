//! Builds and checks what a helper VM boots: a kernel image and an initramfs that holds the agent and
//! just the modules it needs. The files and their manifest are described in [`vmctr_proto::manifest`].
//!
//! ```text
//!   kernel package ──source──┬─ vmlinuz ──kernel──> vmlinux ────────────────┐
//!                            └─ modules dir ──modules──> load order ─┐      ├─assets──> DIR + manifest.json
//!   agent ─────────────────────────────────────────────initramfs──cpio──────┘
//! ```
//!
//! Same input, same bytes: times, inode numbers and order in the archive are fixed.

mod agent;
mod assets;
mod bzimage;
mod cpio;
mod decompress;
mod elf;
mod initramfs;
mod kernel;
mod modules;
mod overlay;
mod signature;
mod source;

use std::path::{Path, PathBuf};

use vmctr_proto::manifest::{GuestManifest, MANIFEST_VERSION};

pub use agent::AgentError;
pub use assets::{InspectError, StoreError, inspect};
pub use bzimage::BzImageError;
pub use cpio::CpioError;
pub use decompress::DecompressError;
pub use elf::ElfError;
pub use kernel::KernelError;
pub use modules::ModuleError;
pub use source::{KernelSource, SourceError};

/// What [`build`] makes guest assets from, and where to.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The kernel and its modules.
    pub kernel: KernelSource,
    /// The agent: a static x86-64 executable.
    pub agent: PathBuf,
    /// Asset directory; made if missing. Other files in it are left alone.
    pub out: PathBuf,
}

/// Guest assets cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The kernel package or the files named are not usable.
    #[error("No kernel to build guest assets from")]
    Source(#[from] SourceError),
    /// The kernel image is not usable.
    #[error("{path} is not a usable kernel")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KernelError,
    },
    /// The modules are not usable.
    #[error("The modules of kernel {release} are not usable")]
    Modules {
        /// Kernel release.
        release: String,
        /// Why.
        #[source]
        source: ModuleError,
    },
    /// The agent is not usable.
    #[error("{path} is not a usable guest agent")]
    Agent {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: AgentError,
    },
    /// The initramfs cannot be written in its format.
    #[error("The initramfs does not fit its format")]
    Initramfs(#[from] CpioError),
    /// The asset directory cannot be written.
    #[error("Guest assets cannot be written to {dir}")]
    Store {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
}

/// Builds guest assets into `request.out`, replacing those of an earlier build.
///
/// # Errors
/// When the kernel, a needed module or the agent is missing or not what it should be, or the directory
/// cannot be written. An earlier build is then still whole, unless writing itself failed.
pub fn build(request: &BuildRequest) -> Result<GuestManifest, BuildError> {
    let located = request.kernel.locate()?;
    let kernel = kernel::load(located.vmlinuz())
        .map_err(|source| BuildError::Kernel { path: located.vmlinuz().to_owned(), source })?;
    let modules = modules::collect(located.modules(), &kernel.release)
        .map_err(|source| BuildError::Modules { release: kernel.release.clone(), source })?;
    let agent = agent::load(&request.agent)
        .map_err(|source| BuildError::Agent { path: request.agent.clone(), source })?;
    let initramfs = initramfs::pack(&agent, &modules)?;

    let manifest = GuestManifest {
        version: MANIFEST_VERSION,
        kernel_release: kernel.release,
        kernel_source: located.description().to_owned(),
        kernel: assets::describe(assets::KERNEL_FILE, &kernel.image),
        initramfs: assets::describe(assets::INITRAMFS_FILE, &initramfs),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        hard_links: modules.iter().any(|module| module.trusts_names),
        modules: modules.into_iter().map(|module| module.name).collect(),
    };
    store(&request.out, &manifest, &kernel.image, &initramfs)?;
    Ok(manifest)
}

fn store(out: &Path, manifest: &GuestManifest, kernel: &[u8], initramfs: &[u8]) -> Result<(), BuildError> {
    assets::store(out, manifest, kernel, initramfs)
        .map_err(|source| BuildError::Store { dir: out.to_owned(), source })
}
