//! `vmctr template`: the saved VMs that others are restored from.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use anyhow::anyhow;
use rustix::process::{nice, setsid};
use serde::Serialize;
use vmctr_vmm::accel;
use vmctr_vmm::assets::GuestAssets;
use vmctr_vmm::config::Config;
use vmctr_vmm::qemu::Qemu;
use vmctr_vmm::spec::{Host, Limits, MEMORY_ANNOTATION, VCPUS_ANNOTATION, VmSpec};
use vmctr_vmm::template::{Entry, Key, Maker, Store, TemplateError, make, make_or_wait};

use super::{Context, config};
use crate::cli::{TemplateCreate, TemplateRm, TemplateVerb};
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;

/// Of a maker in the background: containers go first.
const BACKGROUND_NICE: i32 = 10;

/// Does what the verb says.
pub async fn run(context: &Context, verb: TemplateVerb) -> Outcome {
    let config = config()?;
    match verb {
        TemplateVerb::Ls => list(context, &Store::new(&config)),
        TemplateVerb::Create(args) => create(context, &config, args).await,
        TemplateVerb::Rm(args) => remove(&Store::new(&config), &args),
    }
}

/// One template as JSON.
#[derive(Serialize)]
struct View {
    key: Key,
    bytes: u64,
    age_seconds: u64,
    /// Whether this boot of the host can use it.
    current: bool,
    memory_mib: Option<u32>,
    vcpus: Option<u32>,
    machine: Option<&'static str>,
    accelerator: Option<&'static str>,
    qemu_version: Option<String>,
}

impl View {
    fn of(entry: Entry) -> Self {
        let age = SystemTime::now().duration_since(entry.made).unwrap_or(Duration::ZERO);
        let shape = entry.shape;
        Self {
            key: entry.key,
            bytes: entry.bytes,
            age_seconds: age.as_secs(),
            current: entry.current,
            memory_mib: shape.as_ref().map(|shape| shape.memory_mib),
            vcpus: shape.as_ref().map(|shape| shape.vcpus),
            machine: shape.as_ref().map(|shape| shape.machine),
            accelerator: shape.as_ref().map(|shape| shape.accelerator),
            qemu_version: shape.map(|shape| shape.qemu_version),
        }
    }

    fn row(&self) -> Vec<String> {
        let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        let text = |text: Option<&str>| text.unwrap_or("-").to_owned();
        let memory = self.memory_mib.map(|mib| output::bytes(u64::from(mib) << 20));
        let state = match (self.current, self.memory_mib) {
            (true, _) => "usable",
            (false, Some(_)) => "of another boot",
            (false, None) => "damaged",
        };
        vec![
            self.key.to_string(),
            output::bytes(self.bytes),
            output::duration(self.age_seconds),
            memory.unwrap_or_else(|| "-".to_owned()),
            number(self.vcpus),
            text(self.machine),
            text(self.accelerator),
            text(self.qemu_version.as_deref()),
            state.to_owned(),
        ]
    }
}

fn list(context: &Context, store: &Store) -> Outcome {
    let views: Vec<_> = store.list()?.into_iter().map(View::of).collect();
    if context.json {
        output::json(&views)?;
    } else {
        let header = ["KEY", "SIZE", "AGE", "MEMORY", "CPUS", "MACHINE", "ACCEL", "QEMU", "STATE"];
        output::print_line(&output::table(&header, views.iter().map(View::row)))?;
    }
    Ok(Verdict::Good)
}

async fn create(context: &Context, config: &Config, args: TemplateCreate) -> Outcome {
    let background = args.background;
    if background {
        // Already a session's leader, or not allowed: it works all the same.
        let _ = setsid();
        let _ = nice(BACKGROUND_NICE);
    }
    let assets = GuestAssets::find(config)?;
    let qemu = Qemu::find(config)?;
    let accelerator = accel::resolve(config, &assets, &qemu).await?.accelerator;
    let maker = Maker {
        spec: spec(config, args)?,
        assets,
        qemu,
        accelerator,
        jail: config.jail.clone(),
        boot_timeout: config.vm.boot_timeout_seconds.duration(),
    };
    let store = Store::new(config);
    let made = if background { make(&maker, &store).await } else { make_or_wait(&maker, &store).await };
    let key = match made {
        // Whoever makes it says what there is to say; here it would look like a failure.
        Err(TemplateError::Busy(key)) if background => key,
        made => made?,
    };
    if context.json {
        output::json(&serde_json::json!({ "key": key }))?;
    } else {
        output::print_line(key.as_str())?;
    }
    Ok(Verdict::Good)
}

/// The size is given as a container's annotations would give it.
fn spec(config: &Config, args: TemplateCreate) -> Result<VmSpec, Failure> {
    let asked = [(MEMORY_ANNOTATION, args.memory), (VCPUS_ANNOTATION, args.vcpus)];
    let asked: HashMap<_, _> =
        asked.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
    Ok(VmSpec::resolve(&config.vm, &Limits::default(), &asked, &Host::detect())?)
}

fn remove(store: &Store, args: &TemplateRm) -> Outcome {
    let keys = if args.all {
        store.list()?.into_iter().map(|entry| entry.key).collect()
    } else {
        args.keys
            .iter()
            .map(|key| key.parse::<Key>())
            .collect::<Result<Vec<_>, _>>()
            .map_err(Failure::not_found)?
    };
    for key in keys {
        if !store.remove(&key)? && !args.all {
            return Err(Failure::not_found(anyhow!("There is no template {key}")));
        }
    }
    Ok(Verdict::Good)
}
