//! The configuration file: `/etc/vmctr/config.toml`, or the file that `VMCTR_CONFIG` names.
//!
//! Every value is parsed into a type that cannot be wrong; an unknown key or a bad value is refused
//! with file, line and key. Defaults stand in the `Default` implementations below and nowhere else.
//!
//! ```toml
//! run_dir = "/run/vmctr"               # one directory per VM lives here
//! guest_dir = "/usr/share/vmctr/guest" # guest kernel and initramfs; default: looked for, see `assets`
//! qemu = "/usr/bin/qemu-system-x86_64" # default: looked for in PATH
//! template_dir = "/run/vmctr/templates" # some 75 MiB per shape of VM; default: `templates` in `run_dir`
//!
//! [vm]
//! memory = "512MiB"            # of a container without a memory limit
//! memory_overhead = "128MiB"   # on top of a container's memory limit, for the guest's kernel and agent
//! vcpus = 1                    # of a container without a CPU quota
//! machine = "q35"              # or "pc"
//! accelerator = "auto"         # "kvm", "tcg"
//! boot_timeout_seconds = 60
//! start = "template"           # "cold": boot every VM; "pool": take one that waits, see [pool]
//!
//! [pool]
//! size = 0                     # VMs that wait for containers, kept by `vmctr pool run`
//! memory = "2GiB"              # which together have no more than this
//!
//! [jail]
//! first_uid = 1900000000       # QEMU runs as this user number plus its process ID
//!
//! [log]
//! level = "info"               # "error", "warn", "debug", "trace"
//! ```

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs, io};

use serde::{Deserialize, Deserializer, Serialize};

use crate::accel::AcceleratorChoice;
use crate::memory::MemoryMib;
use crate::spec::{Machine, StartMode, Vcpus};

/// Environment variable that names the file.
pub const CONFIG_ENV: &str = "VMCTR_CONFIG";

/// The file when [`CONFIG_ENV`] is unset; it may be absent.
pub const CONFIG_FILE: &str = "/etc/vmctr/config.toml";

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the directory of each VM lives.
    #[serde(deserialize_with = "run_dir")]
    pub run_dir: PathBuf,
    /// Directory of the guest's kernel and initramfs.
    #[serde(deserialize_with = "absolute_option")]
    pub guest_dir: Option<PathBuf>,
    /// QEMU's binary.
    #[serde(deserialize_with = "absolute_option")]
    pub qemu: Option<PathBuf>,
    /// Directory of the templates.
    #[serde(deserialize_with = "template_dir")]
    pub template_dir: Option<PathBuf>,
    /// What a VM gets when the container asks for nothing else.
    pub vm: VmDefaults,
    /// VMs that wait.
    pub pool: PoolConfig,
    /// How QEMU is confined.
    pub jail: JailConfig,
    /// What is logged.
    pub log: LogConfig,
}

/// The `[vm]` table.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmDefaults {
    /// Memory of a VM whose container has no memory limit.
    pub memory: MemoryMib,
    /// What the guest's kernel and agent need on top of a container's memory limit.
    pub memory_overhead: MemoryMib,
    /// CPUs of a VM whose container has no CPU quota.
    pub vcpus: Vcpus,
    /// QEMU's machine type.
    pub machine: Machine,
    /// What runs the guest's instructions.
    pub accelerator: AcceleratorChoice,
    /// How long the guest may take from QEMU's start until the agent answers.
    pub boot_timeout_seconds: Seconds,
    /// How VMs start.
    pub start: StartMode,
}

/// The `[pool]` table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// How many.
    pub size: u32,
    /// How much memory they have, all together.
    pub memory: MemoryMib,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { size: 0, memory: crate::pool::DEFAULT_MEMORY }
    }
}

/// The `[jail]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JailConfig {
    /// QEMU runs as this user number plus its process ID.
    pub first_uid: FirstUid,
}

/// The `[log]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// The least important messages that are still written; `RUST_LOG` wins over it.
    pub level: LogLevel,
}

/// Importance of log messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is odd.
    Warn,
    /// Starts and stops.
    #[default]
    Info,
    /// Each step.
    Debug,
    /// Each message.
    Trace,
}

impl LogLevel {
    /// The name that `RUST_LOG` and tracing filters use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// A time limit of 1 to 3600 seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Seconds(u32);

impl Seconds {
    const MAX: u32 = 3600;

    /// As a duration.
    #[must_use]
    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0.into())
    }
}

impl TryFrom<u32> for Seconds {
    type Error = String;

    fn try_from(seconds: u32) -> Result<Self, String> {
        match seconds {
            1..=Self::MAX => Ok(Self(seconds)),
            _ => Err(format!("{seconds} is not a time limit: use 1 to {} seconds", Self::MAX)),
        }
    }
}

impl From<Seconds> for u32 {
    fn from(seconds: Seconds) -> Self {
        seconds.0
    }
}

/// Start of the range of user numbers that VMs run as.
///
/// A VM's user is `first_uid` + the process ID of its QEMU: two live processes never share a process
/// ID, so two live VMs never share a user, without a file of allocated numbers that a crash could
/// leave stale. Linux gives out no process ID above 2^22, which bounds the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct FirstUid(u32);

impl FirstUid {
    /// Kernel's PID_MAX_LIMIT.
    const PID_MAX: u32 = 1 << 22;
    /// Below are the users of the system and of services.
    const MIN: u32 = 1 << 16;
    /// 2^32 - 1 means "no user", and tools take numbers above 2^31 for negative ones.
    const MAX: u32 = i32::MAX as u32 - Self::PID_MAX;

    /// The user number of the VM whose QEMU has this process ID.
    #[must_use]
    pub fn for_pid(self, pid: u32) -> u32 {
        self.0 + pid.min(Self::PID_MAX)
    }
}

impl Default for FirstUid {
    /// Above the ranges that distributions hand to users, services and containers.
    fn default() -> Self {
        Self(1_900_000_000)
    }
}

impl TryFrom<u32> for FirstUid {
    type Error = String;

    fn try_from(uid: u32) -> Result<Self, String> {
        match uid {
            Self::MIN..=Self::MAX => Ok(Self(uid)),
            _ => {
                Err(format!("{uid} cannot start a range of user numbers: use {} to {}", Self::MIN, Self::MAX))
            }
        }
    }
}

impl From<FirstUid> for u32 {
    fn from(uid: FirstUid) -> Self {
        uid.0
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("Cannot read the configuration file {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// An unknown key, a bad value, or no TOML at all.
    #[error("{}:{line}: {message}", file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// Counts from 1.
        line: usize,
        /// What is wrong, with the key.
        message: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: PathBuf::from("/run/vmctr"),
            guest_dir: None,
            qemu: None,
            template_dir: None,
            vm: VmDefaults::default(),
            pool: PoolConfig::default(),
            jail: JailConfig::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for VmDefaults {
    fn default() -> Self {
        Self {
            memory: MemoryMib::new(512),
            memory_overhead: MemoryMib::new(128),
            vcpus: Vcpus::ONE,
            machine: Machine::default(),
            accelerator: AcceleratorChoice::default(),
            boot_timeout_seconds: Seconds(60),
            start: StartMode::default(),
        }
    }
}

impl Config {
    /// The configuration of this process: the file named by `VMCTR_CONFIG`, else `/etc/vmctr/config.toml`
    /// if there is one, else the defaults.
    ///
    /// # Errors
    /// A file that cannot be read, unknown keys, bad values.
    pub fn load() -> Result<Self, ConfigError> {
        match env::var_os(CONFIG_ENV) {
            Some(file) => Self::from_file(Path::new(&file)),
            None => match Self::from_file(Path::new(CONFIG_FILE)) {
                Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    Ok(Self::default())
                }
                loaded => loaded,
            },
        }
    }

    /// Reads one file.
    ///
    /// # Errors
    /// As for [`Config::load`].
    pub fn from_file(file: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(file).map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
        Self::from_text(&text, file)
    }

    fn from_text(text: &str, file: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| invalid(text, file, error))
    }
}

/// One line: position, cause, key.
fn invalid(text: &str, file: &Path, mut error: toml::de::Error) -> ConfigError {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = 1 + text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count();
    // Without the input, the crate prints the message and then the key's path, each on a line.
    error.set_input(None);
    let message = error.to_string().trim_end().replace('\n', " ");
    ConfigError::Invalid { file: file.to_owned(), line, message }
}

fn absolute<'de, D: Deserializer<'de>>(value: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(value)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(serde::de::Error::custom(format!("{} is not an absolute path", path.display())))
    }
}

/// The longest path of a socket below each folder, which the kernel limits.
const BELOW_RUN_DIR: &str = "/templates/run/0123456789abcdef/vhost-vsock.sock";
const BELOW_TEMPLATE_DIR: &str = "/run/0123456789abcdef/vhost-vsock.sock";

fn run_dir<'de, D: Deserializer<'de>>(value: D) -> Result<PathBuf, D::Error> {
    with_room_for(BELOW_RUN_DIR, absolute(value)?)
}

fn template_dir<'de, D: Deserializer<'de>>(value: D) -> Result<Option<PathBuf>, D::Error> {
    with_room_for(BELOW_TEMPLATE_DIR, absolute(value)?).map(Some)
}

fn with_room_for<E: serde::de::Error>(below: &str, dir: PathBuf) -> Result<PathBuf, E> {
    /// `sun_path` of unix(7), without the zero at its end.
    const SOCKET_PATH: usize = 107;
    let limit = SOCKET_PATH - below.len();
    if dir.as_os_str().len() <= limit {
        return Ok(dir);
    }
    Err(E::custom(format!("{} is too long for the sockets in it: use at most {limit} bytes", dir.display())))
}

fn absolute_option<'de, D: Deserializer<'de>>(value: D) -> Result<Option<PathBuf>, D::Error> {
    absolute(value).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::from_text(text, Path::new("/etc/vmctr/config.toml"))
    }

    fn refusal(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn folders_leave_room_for_the_paths_of_sockets() {
        let dir = |length: usize| format!("/{}", "x".repeat(length - 1));
        for (key, limit) in [("run_dir", 59), ("template_dir", 69)] {
            parse(&format!("{key} = {:?}", dir(limit))).unwrap();
            let refusal = refusal(&format!("{key} = {:?}", dir(limit + 1)));
            assert!(
                refusal.contains(&format!("use at most {limit} bytes")) && refusal.contains(key),
                "{refusal}"
            );
        }
    }

    #[test]
    fn the_documented_file_holds_the_defaults() {
        let doc: String = include_str!("config.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! "))
            .skip_while(|line| *line != "```toml")
            .skip(1)
            .take_while(|line| *line != "```")
            .map(|line| format!("{line}\n"))
            .collect();
        let mut documented = parse(&doc).unwrap();
        assert_eq!(documented.guest_dir.take(), Some("/usr/share/vmctr/guest".into()));
        assert_eq!(documented.qemu.take(), Some("/usr/bin/qemu-system-x86_64".into()));
        assert_eq!(documented.template_dir.take(), Some("/run/vmctr/templates".into()));
        assert_eq!(documented, Config::default());
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let text = refusal("run_dir = \"/run/x\"\n\n[vm]\nmemry = \"1GiB\"\n");
        assert!(text.starts_with("/etc/vmctr/config.toml:4: unknown field `memry`"), "{text}");
        assert!(refusal("[vmm]\n").contains("unknown field `vmm`"));
    }

    #[test]
    fn bad_values_are_refused_with_line_and_key() {
        for (text, line, key) in [
            ("[vm]\nmemory = \"512\"\n", 2, "`vm.memory`"),
            ("[vm]\nvcpus = 0\n", 2, "`vm.vcpus`"),
            ("[vm]\n\naccelerator = \"xen\"\n", 3, "`vm.accelerator`"),
            ("[vm]\nboot_timeout_seconds = 0\n", 2, "`vm.boot_timeout_seconds`"),
            ("[jail]\nfirst_uid = 0\n", 2, "`jail.first_uid`"),
            ("[jail]\nfirst_uid = 4294967295\n", 2, "`jail.first_uid`"),
            ("[log]\nlevel = \"loud\"\n", 2, "`log.level`"),
            ("run_dir = \"run\"\n", 1, "`run_dir`"),
            ("guest_dir = \"x\"\n", 1, "`guest_dir`"),
            ("template_dir = \"x\"\n", 1, "`template_dir`"),
            ("[vm]\nstart = \"warm\"\n", 2, "`vm.start`"),
        ] {
            let message = refusal(text);
            assert!(message.starts_with(&format!("/etc/vmctr/config.toml:{line}: ")), "{message}");
            assert!(message.contains(key), "{message} does not name {key}");
        }
    }

    #[test]
    fn broken_toml_is_refused_with_its_line() {
        assert!(refusal("[log]\nlevel = \n").starts_with("/etc/vmctr/config.toml:2: "));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::from_file(Path::new("/nonexistent/vmctr.toml")).unwrap_err();
        assert_eq!(error.to_string(), "Cannot read the configuration file /nonexistent/vmctr.toml");
    }

    #[test]
    fn each_process_id_has_its_own_user() {
        let first = FirstUid::default();
        assert_eq!(first.for_pid(7), 1_900_000_007);
        assert_ne!(first.for_pid(1), first.for_pid(2));
        assert!(FirstUid::try_from(FirstUid::MAX).unwrap().for_pid(u32::MAX) <= i32::MAX as u32);
    }
}
