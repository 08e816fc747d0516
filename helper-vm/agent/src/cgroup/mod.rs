//! A container's control group (version 2), as files.
//!
//! ```text
//!   /sys/fs/cgroup/
//!     agent/          PID 1 and its helpers
//!     vmctr/          limits that keep the agent alive
//!       c1/           one container; what it creates below is its own
//! ```
//!
//! The container's processes may create groups below theirs: walks are bounded and never fail because
//! one vanishes meanwhile.

mod devices;
mod parse;
mod stats;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use libcontainer::oci_spec::runtime::{Linux, LinuxResources};
use rustix::process::Pid;

use crate::sys::{self, Signal};

pub use devices::Loaded as DeviceProgram;

/// Mount point of cgroup2.
pub const ROOT: &str = "/sys/fs/cgroup";
/// PID 1's group.
pub const AGENT: &str = "agent";
/// Parent of all containers' groups.
pub const CONTAINERS: &str = "vmctr";

/// Groups and processes that a walk visits at most.
const MAX_GROUPS: usize = 1024;
const MAX_PROCESSES: usize = 1 << 16;

/// How long the kernel gets to freeze, thaw or empty a group.
const SETTLE_TIME: Duration = Duration::from_secs(10);

/// A control group operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: \"{field}\" is missing or no number", path = path.display())]
    Field { path: PathBuf, field: &'static str },
    #[error("the container's processes did not {what} within {} s", SETTLE_TIME.as_secs())]
    Unsettled { what: &'static str },
    #[error("linux.resources.devices")]
    Devices(#[from] devices::RuleError),
    #[error("applying linux.resources")]
    Apply(#[source] Box<dyn std::error::Error + Send + Sync>),
}

type Result<T> = std::result::Result<T, Error>;

/// The group of one container.
#[derive(Clone, Debug)]
pub struct Cgroup {
    name: String,
    dir: PathBuf,
}

impl Cgroup {
    /// Names the group of the container with this short name; nothing is created.
    pub fn of(name: &str) -> Self {
        Self { name: name.to_owned(), dir: Path::new(ROOT).join(CONTAINERS).join(name) }
    }

    /// The path that the runtime spec's `linux.cgroupsPath` takes.
    pub fn spec_path(&self) -> PathBuf {
        Path::new("/").join(CONTAINERS).join(&self.name)
    }

    /// Creates the group, unless that was done ahead.
    pub fn create(&self) -> Result<()> {
        match fs::create_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            created => created.map_err(|source| Error::File { path: self.dir.clone(), source }),
        }
    }

    /// Restricts devices as the spec says; nodes that it lists can be used. `last` is what the call before
    /// returned.
    pub fn restrict_devices(
        &self,
        linux: &Linux,
        last: Option<Arc<DeviceProgram>>,
    ) -> Result<Arc<DeviceProgram>> {
        let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_deref());
        let program =
            devices::program(rules.unwrap_or_default(), linux.devices().as_deref().unwrap_or_default())?;
        let attach = |program: Arc<DeviceProgram>| {
            sys::attach_device_program(File::open(&self.dir)?.as_fd(), program.as_fd())?;
            Ok(program)
        };
        let attached = DeviceProgram::of(program, last).and_then(attach);
        attached.map_err(|source| Error::File { path: self.dir.clone(), source })
    }

    /// The file whose changes announce an OOM kill.
    pub fn memory_events(&self) -> PathBuf {
        self.dir.join("memory.events")
    }

    /// Processes of the group that the OOM killer took so far.
    pub fn oom_kills(&self) -> Result<u64> {
        self.field("memory.events", "oom_kill")
    }

    /// Sets limits; absent ones stay as they are.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        use libcgroups::common::{CgroupManager, ControllerOpt};
        let failed = |error: libcgroups::v2::manager::V2ManagerError| Error::Apply(error.into());
        let manager = libcgroups::v2::manager::Manager::new(ROOT.into(), self.spec_path()).map_err(failed)?;
        let options =
            ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        manager.apply(&options).map_err(failed)
    }

    /// Stops or continues all processes; returns when the kernel says so.
    pub async fn set_frozen(&self, frozen: bool) -> Result<()> {
        let wanted = u64::from(frozen);
        self.write("cgroup.freeze", &wanted.to_string())?;
        let what = if frozen { "freeze" } else { "thaw" };
        self.settle(what, || Ok(self.field("cgroup.events", "frozen")? == wanted)).await
    }

    /// Kills everything in the group and below, frozen or not, and waits until it is gone.
    pub async fn kill_and_wait(&self) -> Result<()> {
        self.kill()?;
        self.settle("die", || Ok(!self.dir.exists() || self.field("cgroup.events", "populated")? == 0)).await
    }

    /// SIGKILL to everything in the group and below; a group that is gone holds nothing.
    pub fn kill(&self) -> Result<()> {
        if self.dir.exists() { self.write("cgroup.kill", "1") } else { Ok(()) }
    }

    /// Sends a signal to everything in the group and below.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if signal == Signal::KILL {
            return self.kill();
        }
        for pid in self.processes()? {
            // One that is gone meanwhile needs no signal.
            let _ = sys::kill(pid, signal);
        }
        Ok(())
    }

    /// Everything in the group and below.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        for group in self.groups() {
            let text = match fs::read_to_string(group.join("cgroup.procs")) {
                Ok(text) => text,
                Err(source) if group == self.dir => {
                    return Err(Error::File { path: group.join("cgroup.procs"), source });
                }
                Err(_) => continue,
            };
            let room = MAX_PROCESSES - pids.len();
            pids.extend(text.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).take(room));
        }
        Ok(pids)
    }

    /// Removes the group, deepest first; it must be empty of processes.
    pub fn remove(&self) -> Result<()> {
        for group in self.groups().into_iter().rev() {
            match fs::remove_dir(&group) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::File { path: group, source }),
            }
        }
        Ok(())
    }

    /// The group and those below it, parents before children.
    fn groups(&self) -> Vec<PathBuf> {
        let mut groups = vec![self.dir.clone()];
        let mut next = 0;
        while next < groups.len() && groups.len() < MAX_GROUPS {
            let entries = fs::read_dir(&groups[next]).into_iter().flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            groups.extend(below.map(|entry| entry.path()));
            next += 1;
        }
        groups
    }

    async fn settle(&self, what: &'static str, done: impl Fn() -> Result<bool>) -> Result<()> {
        let deadline = tokio::time::Instant::now() + SETTLE_TIME;
        let mut pause = Duration::from_millis(1);
        while !done()? {
            if tokio::time::Instant::now() >= deadline {
                return Err(Error::Unsettled { what });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, value).map_err(|source| Error::File { path, source })
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        fs::read_to_string(&path).map_err(|source| Error::File { path, source })
    }

    fn field(&self, file: &str, field: &'static str) -> Result<u64> {
        parse::keyed(&self.read(file)?, field)
            .ok_or_else(|| Error::Field { path: self.dir.join(file), field })
    }
}
