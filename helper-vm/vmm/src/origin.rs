//! Where a VM comes from: a template if there is one, else a boot; and the template that is made for the next one.
//!
//! ```text
//!   cold ───────────────────────────────────────────> boot
//!   template ── there, and whole ── restore ── fails ─> boot, the template is removed, a new one is made
//!            └─ not there, or damaged ──────────────> boot, one is made once the VM runs
//! ```
//!
//! No start waits for a template to be made: a process of its own does that, `vmctr template create`.

use std::process::Stdio;
use std::sync::Arc;

use crate::accel::Accelerator;
use crate::assets::GuestAssets;
use crate::binaries::{self, BinaryError};
use crate::config::Config;
use crate::qemu::Qemu;
use crate::spec::{StartMode, VmSpec};
use crate::template::{Key, Store, Template, TemplateError};
use crate::vm::{Origin, VmError};
use tokio::process::Command;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use crate::error_chain;

/// The program that makes templates.
const MAKER: &str = "vmctr";

/// What the VM is made of.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its size.
    pub spec: VmSpec,
    /// What it boots.
    pub assets: GuestAssets,
    /// What runs it.
    pub qemu: Qemu,
    /// How its instructions run.
    pub accelerator: Accelerator,
}

/// The choice for one VM.
#[derive(Debug)]
pub struct Origins {
    machine: Machine,
    store: Store,
    /// `None` when no template is wanted.
    key: Option<Key>,
    template: Option<Arc<Template>>,
}

impl Origins {
    /// Looks for a template. Trouble with one is logged: the VM can always boot.
    pub async fn find(config: &Config, start: StartMode, machine: Machine) -> Self {
        let store = Store::new(config);
        let without = Self { machine: machine.clone(), store: store.clone(), key: None, template: None };
        if start == StartMode::Cold {
            return without;
        }
        let looked = spawn_blocking(move || look(&store, &machine));
        let Ok((key, template)) = looked.await else { return without };
        Self { key, template: template.map(Arc::new), ..without }
    }

    /// What to try first.
    pub fn first(&self) -> Origin {
        match &self.template {
            Some(template) => Origin::Template(template.clone()),
            None => self.boot(),
        }
    }

    /// What always works.
    pub fn boot(&self) -> Origin {
        Origin::Boot(Box::new(self.machine.assets.clone()))
    }

    /// Name of the template for this VM; `None` when none is wanted.
    pub fn key(&self) -> Option<&Key> {
        self.key.as_ref()
    }

    /// Whether the first is a template.
    pub fn is_template(&self) -> bool {
        self.template.is_some()
    }

    /// The template did not work. Where QEMU was not even started, that is not the template's fault.
    pub async fn discard(&self, error: &VmError) {
        warn!("The VM boots instead of being restored: {}", error_chain(error));
        if error.is_the_hosts() {
            return;
        }
        let (Some(key), store) = (self.key.clone(), self.store.clone()) else { return };
        let removed = spawn_blocking(move || store.remove(&key));
        if let Ok(Err(error)) = removed.await {
            warn!("{}", error_chain(&error));
        }
    }

    /// Makes the template if it is missing. Its process outlives this one and is bounded by its own limits.
    pub fn make_template_later(&self) {
        let Some(key) = &self.key else { return };
        if self.store.path(key).exists() || self.store.is_being_made(key) || self.store.failed_lately(key) {
            return;
        }
        match self.start_maker(key) {
            Ok(()) => info!(%key, "A template is being made"),
            Err(error) => warn!("Cannot make a template: {}", error_chain(&error)),
        }
    }

    fn start_maker(&self, key: &Key) -> Result<(), MakerError> {
        let log = self.store.create_log(key)?;
        let spec = &self.machine.spec;
        let mut maker = Command::new(binaries::find(MAKER)?);
        maker.args(["template", "create", "--background"]);
        maker.args(["--memory", &spec.memory().to_string(), "--vcpus", &spec.vcpus().to_string()]);
        maker.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir("/");
        // Reaped by the runtime, or by init when this process is gone.
        maker.spawn().map(drop).map_err(MakerError::Start)
    }
}

/// The maker does not run.
#[derive(Debug, thiserror::Error)]
enum MakerError {
    /// Its log cannot be written.
    #[error(transparent)]
    Log(#[from] TemplateError),
    /// It is not installed.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// The system refuses.
    #[error("Cannot start {MAKER}")]
    Start(#[source] std::io::Error),
}

fn look(store: &Store, machine: &Machine) -> (Option<Key>, Option<Template>) {
    let Machine { spec, assets, qemu, accelerator } = machine;
    let key = match Key::of(spec, assets, qemu, *accelerator) {
        Ok(key) => key,
        Err(error) => {
            warn!("The VM boots, as no template can be named: {error}");
            return (None, None);
        }
    };
    let template = store.open(&key).unwrap_or_else(|error| {
        warn!("The VM boots instead of being restored: {}", error_chain(&error));
        if let Err(error) = store.remove(&key) {
            warn!("{}", error_chain(&error));
        }
        None
    });
    (Some(key), template)
}
