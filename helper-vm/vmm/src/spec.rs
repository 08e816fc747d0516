//! What one VM is made of: [`VmSpec`], validated once, here.
//!
//! ```text
//!   annotation io.vmctr.memory / io.vmctr.vcpus      asked for by name: taken as it is, or refused
//!     else OCI limit                                 an upper bound: memory + overhead, quota rounded up,
//!                                                    never more than the host has
//!     else config [vm]
//! ```

use std::collections::HashMap;
use std::fmt;
use std::hash::BuildHasher;
use std::thread::available_parallelism;

use serde::{Deserialize, Serialize};

use crate::config::VmDefaults;
use crate::memory::{MemoryError, MemoryMib};

/// Annotation that sets the VM's memory, such as `768MiB`.
pub const MEMORY_ANNOTATION: &str = "io.vmctr.memory";

/// Annotation that sets the number of the VM's CPUs.
pub const VCPUS_ANNOTATION: &str = "io.vmctr.vcpus";

/// Annotation that sets how the VM starts: `cold`, `template` or `pool`.
pub const START_ANNOTATION: &str = "io.vmctr.start";

/// How a VM starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StartMode {
    /// It boots, and shares nothing with any other VM.
    Cold,
    /// It goes on from a VM that was booted once for all; where there is none yet, it boots and one is made.
    #[default]
    Template,
    /// It is one that waits in the pool; where none waits, or the container wants another size, a template.
    Pool,
}

impl StartMode {
    /// The container's own choice, else the configuration's.
    ///
    /// # Errors
    /// An annotation that names no mode.
    pub fn resolve<S: BuildHasher>(
        default: Self,
        annotations: &HashMap<String, String, S>,
    ) -> Result<Self, SpecError> {
        match annotations.get(START_ANNOTATION).map(String::as_str) {
            None => Ok(default),
            Some("cold") => Ok(Self::Cold),
            Some("template") => Ok(Self::Template),
            Some("pool") => Ok(Self::Pool),
            Some(given) => Err(SpecError::StartAnnotation { given: given.to_owned() }),
        }
    }
}

/// The guest does not boot with less.
pub const MEMORY_MIN: MemoryMib = MemoryMib::new(128);

/// Number of virtual CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vcpus(u32);

impl Vcpus {
    /// One CPU.
    pub const ONE: Self = Self(1);
    /// As many as QEMU's x86 machines take.
    pub const MAX: Self = Self(255);

    /// As a number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vcpus {
    type Error = String;

    fn try_from(count: u32) -> Result<Self, String> {
        match count {
            1..=255 => Ok(Self(count)),
            _ => Err(format!("{count} is not a number of CPUs: use 1 to {}", Self::MAX)),
        }
    }
}

impl From<Vcpus> for u32 {
    fn from(vcpus: Vcpus) -> Self {
        vcpus.0
    }
}

impl fmt::Display for Vcpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// QEMU's machine type. `microvm` is missing on purpose: it hangs in some boots without KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// PCI Express, Intel ICH9.
    #[default]
    Q35,
    /// PCI, Intel i440FX.
    Pc,
}

impl Machine {
    /// QEMU's name for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }
}

/// Limits of the container's OCI spec, as `linux.resources` writes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `memory.limit` in bytes; not above 0 means no limit.
    pub memory: Option<i64>,
    /// `cpu.quota` in microseconds per period; not above 0 means no limit.
    pub cpu_quota: Option<i64>,
    /// `cpu.period` in microseconds.
    pub cpu_period: Option<u64>,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: Vcpus,
    /// Memory, whether free or not.
    pub memory: MemoryMib,
}

impl Host {
    /// Asks the kernel.
    #[must_use]
    pub fn detect() -> Self {
        let cpus = available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX));
        let info = rustix::system::sysinfo();
        let bytes = info.totalram.saturating_mul(u64::from(info.mem_unit.max(1)));
        Self { cpus: Vcpus(cpus.clamp(1, Vcpus::MAX.0)), memory: MemoryMib::from_bytes_rounded_up(bytes) }
    }
}

/// A VM that this host can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct VmSpec {
    memory: MemoryMib,
    vcpus: Vcpus,
    machine: Machine,
}

/// The container asks for a VM that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The annotation's value is no amount of memory.
    #[error("Annotation {MEMORY_ANNOTATION} cannot be used")]
    MemoryAnnotation(#[source] MemoryError),
    /// The annotation's value is no number of CPUs.
    #[error("Annotation {VCPUS_ANNOTATION}={given:?} is not a number of CPUs: use 1 to {host}")]
    VcpusAnnotation {
        /// As written.
        given: String,
        /// The host's CPUs.
        host: Vcpus,
    },
    /// The annotation's value is no way to start.
    #[error("Annotation {START_ANNOTATION}={given:?} is none of \"cold\", \"template\" and \"pool\"")]
    StartAnnotation {
        /// As written.
        given: String,
    },
    /// Less than the guest boots with.
    #[error("{source_name} gives the VM {given}, but the guest needs at least {MEMORY_MIN}")]
    TooLittleMemory {
        /// The annotation, the limit or the config key that gave it.
        source_name: &'static str,
        /// As resolved.
        given: MemoryMib,
    },
    /// More than the host has.
    #[error("Annotation {MEMORY_ANNOTATION} asks for {given}, but the host has {host}")]
    TooMuchMemory {
        /// As asked.
        given: MemoryMib,
        /// The host's memory.
        host: MemoryMib,
    },
}

impl VmSpec {
    /// Resolves defaults, limits and annotations into a VM for this host.
    ///
    /// # Errors
    /// Annotations that cannot be read or exceed the host; memory below [`MEMORY_MIN`].
    pub fn resolve<S: BuildHasher>(
        defaults: &VmDefaults,
        limits: &Limits,
        annotations: &HashMap<String, String, S>,
        host: &Host,
    ) -> Result<Self, SpecError> {
        let asked = annotations.get(MEMORY_ANNOTATION).map(String::as_str);
        let memory = resolve_memory(defaults, limits.memory, asked, host.memory)?;
        let asked = annotations.get(VCPUS_ANNOTATION).map(String::as_str);
        let vcpus = resolve_vcpus(defaults, limits, asked, host.cpus)?;
        Ok(Self { memory, vcpus, machine: defaults.machine })
    }

    /// The smallest VM: what the accelerator probe boots.
    #[must_use]
    pub fn smallest(machine: Machine) -> Self {
        Self { memory: MEMORY_MIN, vcpus: Vcpus::ONE, machine }
    }

    /// The guest's RAM.
    #[must_use]
    pub fn memory(&self) -> MemoryMib {
        self.memory
    }

    /// The guest's CPUs.
    #[must_use]
    pub fn vcpus(&self) -> Vcpus {
        self.vcpus
    }

    /// The machine type.
    #[must_use]
    pub fn machine(&self) -> Machine {
        self.machine
    }
}

fn resolve_memory(
    defaults: &VmDefaults,
    limit: Option<i64>,
    asked: Option<&str>,
    host: MemoryMib,
) -> Result<MemoryMib, SpecError> {
    let limit = limit.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0);
    let (source_name, given) = if let Some(asked) = asked {
        let given = asked.parse().map_err(SpecError::MemoryAnnotation)?;
        if given > host {
            return Err(SpecError::TooMuchMemory { given, host });
        }
        ("Annotation io.vmctr.memory", given)
    } else if let Some(limit) = limit {
        let wanted = MemoryMib::from_bytes_rounded_up(limit).saturating_add(defaults.memory_overhead);
        ("The container's memory limit plus the config's vm.memory_overhead", wanted.min(host))
    } else {
        ("The config's vm.memory", defaults.memory)
    };
    if given < MEMORY_MIN {
        return Err(SpecError::TooLittleMemory { source_name, given });
    }
    Ok(given)
}

fn resolve_vcpus(
    defaults: &VmDefaults,
    limits: &Limits,
    asked: Option<&str>,
    host: Vcpus,
) -> Result<Vcpus, SpecError> {
    if let Some(asked) = asked {
        let vcpus = asked.parse().ok().and_then(|count: u32| Vcpus::try_from(count).ok());
        return vcpus
            .filter(|vcpus| *vcpus <= host)
            .ok_or_else(|| SpecError::VcpusAnnotation { given: asked.to_owned(), host });
    }
    Ok(quota_cpus(limits).unwrap_or(defaults.vcpus).min(host))
}

/// CPUs that the quota can keep busy, rounded up.
fn quota_cpus(limits: &Limits) -> Option<Vcpus> {
    /// The kernel's period when the spec names none.
    const DEFAULT_PERIOD: u64 = 100_000;
    let quota = limits.cpu_quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0)?;
    let period = limits.cpu_period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
    let cpus = quota.div_ceil(period).clamp(1, Vcpus::MAX.0.into());
    u32::try_from(cpus).ok().map(Vcpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host { cpus: Vcpus(4), memory: MemoryMib::new(8192) };

    fn resolve(limits: Limits, annotations: &[(&str, &str)]) -> Result<VmSpec, SpecError> {
        let annotations =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        VmSpec::resolve::<std::hash::RandomState>(&VmDefaults::default(), &limits, &annotations, &HOST)
    }

    fn memory(limit: i64) -> Limits {
        Limits { memory: Some(limit), ..Limits::default() }
    }

    fn quota(quota: i64, period: u64) -> Limits {
        Limits { cpu_quota: Some(quota), cpu_period: Some(period), ..Limits::default() }
    }

    #[test]
    fn nothing_asked_gives_the_defaults() {
        let spec = resolve(Limits::default(), &[]).unwrap();
        assert_eq!((spec.memory().mib(), spec.vcpus().get()), (512, 1));
        assert_eq!(resolve(memory(-1), &[]).unwrap().memory().mib(), 512);
        assert_eq!(resolve(quota(-1, 100_000), &[]).unwrap().vcpus().get(), 1);
    }

    #[test]
    fn limits_size_the_vm_up_to_the_host() {
        assert_eq!(resolve(memory(256 << 20), &[]).unwrap().memory().mib(), 256 + 128);
        assert_eq!(resolve(memory(i64::MAX), &[]).unwrap().memory(), HOST.memory);
        assert_eq!(resolve(quota(150_000, 100_000), &[]).unwrap().vcpus().get(), 2);
        assert_eq!(resolve(quota(100_000, 100_000), &[]).unwrap().vcpus().get(), 1);
        assert_eq!(resolve(quota(i64::MAX, 1), &[]).unwrap().vcpus(), HOST.cpus);
        assert_eq!(resolve(quota(300_000, 0), &[]).unwrap().vcpus().get(), 3);
    }

    #[test]
    fn annotations_win_over_limits() {
        let limits = Limits { memory: Some(64 << 20), ..quota(400_000, 100_000) };
        let spec = resolve(limits, &[(MEMORY_ANNOTATION, "1GiB"), (VCPUS_ANNOTATION, "2")]).unwrap();
        assert_eq!((spec.memory().mib(), spec.vcpus().get()), (1024, 2));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (key, value, want) in [
            (MEMORY_ANNOTATION, "lots", "io.vmctr.memory"),
            (MEMORY_ANNOTATION, "16GiB", "the host has 8192MiB"),
            (MEMORY_ANNOTATION, "32MiB", "needs at least"),
            (VCPUS_ANNOTATION, "0", "use 1 to 4"),
            (VCPUS_ANNOTATION, "5", "use 1 to 4"),
            (VCPUS_ANNOTATION, "two", "io.vmctr.vcpus"),
        ] {
            let message = resolve(Limits::default(), &[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(want), "{message} does not say {want}");
        }
    }

    #[test]
    fn this_host_has_cpus_and_memory() {
        let host = Host::detect();
        assert!(host.cpus >= Vcpus::ONE && host.memory.mib() > 64);
    }

    #[test]
    fn the_container_chooses_how_it_starts() {
        let choice = |text: &str| {
            let annotations = HashMap::from([(START_ANNOTATION.to_owned(), text.to_owned())]);
            StartMode::resolve(StartMode::Template, &annotations)
        };
        assert_eq!(choice("cold").unwrap(), StartMode::Cold);
        assert_eq!(choice("template").unwrap(), StartMode::Template);
        assert!(choice("warm").unwrap_err().to_string().contains("io.vmctr.start=\"warm\""));
        let none = HashMap::<String, String>::new();
        assert_eq!(StartMode::resolve(StartMode::Cold, &none).unwrap(), StartMode::Cold);
    }
}
