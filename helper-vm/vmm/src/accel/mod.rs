//! Which accelerator runs the guest: KVM where it really works, QEMU's translator (TCG) elsewhere.
//!
//! A `/dev/kvm` that opens proves nothing: some hosts hand it out and then never run a guest. `auto` is
//! therefore answered by booting this very guest kernel under KVM to the point where its agent answers,
//! within [`PROBE_LIMIT`]. The answer holds until the kernel, QEMU or the host's boot changes.
//!
//! ```text
//!   resolve ── kvm, tcg: as chosen
//!           └─ auto ── no usable /dev/kvm ──────────────────> tcg
//!                   ── accel.json has this key ─────────────> its answer
//!                   ── lock accel.lock (one probe at a time), look again, boot, write accel.json
//! ```

mod cache;
mod probe;

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::assets::GuestAssets;
use crate::config::Config;
use crate::qemu::Qemu;
use crate::vm::VmError;

/// How long the probe's guest may take until its agent answers.
pub const PROBE_LIMIT: Duration = Duration::from_secs(10);

const KVM_DEVICE: &str = "/dev/kvm";

/// What the configuration asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM if it boots the guest on this host, else TCG.
    #[default]
    Auto,
    /// KVM, whatever happens.
    Kvm,
    /// TCG.
    Tcg,
}

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host kernel's.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// "kvm" or "tcg".
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The accelerator and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// To use.
    pub accelerator: Accelerator,
    /// One sentence for people.
    pub reason: String,
}

/// The answer cannot be found or kept.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// The run directory cannot be used.
    #[error("Cannot keep the accelerator's answer in {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The probe could not even start QEMU, which says nothing about KVM.
    #[error("Cannot try KVM")]
    Probe(#[source] VmError),
    /// The probe's thread died.
    #[error("Waiting for another start's accelerator probe failed")]
    Wait(#[source] tokio::task::JoinError),
}

/// The accelerator for `config.vm.accelerator`. Takes up to [`PROBE_LIMIT`] the first time after a boot of
/// the host; a start that comes meanwhile waits for the same probe.
///
/// # Errors
/// The run directory cannot be written, or QEMU cannot be started. A guest that does not boot under KVM is no
/// error: the answer is TCG then.
pub async fn resolve(config: &Config, assets: &GuestAssets, qemu: &Qemu) -> Result<Resolution, AccelError> {
    match config.vm.accelerator {
        AcceleratorChoice::Kvm => Ok(chosen(Accelerator::Kvm)),
        AcceleratorChoice::Tcg => Ok(chosen(Accelerator::Tcg)),
        AcceleratorChoice::Auto => match openable(Path::new(KVM_DEVICE)) {
            Ok(()) => cached_or_probed(config, assets, qemu).await,
            Err(error) => Ok(tcg(format!("{KVM_DEVICE} cannot be opened: {error}"))),
        },
    }
}

fn chosen(accelerator: Accelerator) -> Resolution {
    Resolution { accelerator, reason: format!("the configuration asks for {accelerator}") }
}

fn tcg(reason: String) -> Resolution {
    Resolution { accelerator: Accelerator::Tcg, reason }
}

fn openable(device: &Path) -> io::Result<()> {
    OpenOptions::new().read(true).write(true).open(device).map(drop)
}

async fn cached_or_probed(
    config: &Config,
    assets: &GuestAssets,
    qemu: &Qemu,
) -> Result<Resolution, AccelError> {
    let cache = cache::Cache::new(&config.run_dir, cache::Key::new(config, assets, qemu))?;
    if let Some(answer) = cache.read() {
        return Ok(answer);
    }
    let _lock = cache.lock().await?;
    if let Some(answer) = cache.read() {
        return Ok(answer);
    }
    let answer = probe::probe(config, assets, qemu).await.map_err(AccelError::Probe)?;
    cache.write(&answer)?;
    Ok(answer)
}
