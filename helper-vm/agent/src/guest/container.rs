//! A container as the agent knows it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use libcontainer::oci_spec::runtime::Process;
use rustix::process::Pid;
use tokio::sync::Notify;
use vmctr_fileshare::export::guest::Gate;

use super::helper::Helper;
use super::lifecycle::State;
use crate::cgroup::Cgroup;
use crate::stdio::{Claim, Numbers};

/// A container and its processes.
pub struct Container {
    /// Short name: of its directories, its group and in libcontainer.
    pub name: String,
    /// Its control group.
    pub cgroup: Cgroup,
    /// State of the init process.
    pub init: State,
    /// Master of the init process's terminal.
    pub terminal: Option<Arc<OwnedFd>>,
    /// The end of the init process's report, until it has started.
    pub starting: Option<Helper>,
    /// Further processes by the host's name.
    pub execs: HashMap<Arc<str>, Exec>,
    /// Stopped by the freezer.
    pub frozen: bool,
    /// What the host changes in its root goes through here.
    pub gate: Arc<Gate>,
    /// Being deleted: nothing new begins.
    pub deleting: bool,
    /// Told whenever a process of this container has ended, or could not be built.
    pub exited: Arc<Notify>,
    /// Execs ever registered: names their files.
    registered: u64,
    oom_kills: u64,
}

/// A further process.
pub struct Exec {
    /// Short name: of its files.
    pub name: String,
    /// Where it is in its life.
    pub state: State,
    /// Its streams, until it starts.
    pub streams: Option<(Numbers, Claim)>,
    /// What it runs.
    pub process: Process,
    /// Master of its terminal.
    pub terminal: Option<Arc<OwnedFd>>,
}

impl Container {
    /// A container whose init process is being prepared.
    pub fn new(name: String) -> Self {
        Self {
            cgroup: Cgroup::of(&name),
            name,
            init: State::Preparing,
            terminal: None,
            starting: None,
            execs: HashMap::new(),
            frozen: false,
            gate: Arc::default(),
            deleting: false,
            exited: Arc::default(),
            registered: 0,
            oom_kills: 0,
        }
    }

    /// A short name that no process of this container had before.
    pub fn new_exec_name(&mut self) -> String {
        self.registered += 1;
        format!("e{}", self.registered)
    }

    /// State of the init process or of an exec.
    pub fn state(&mut self, exec: Option<&str>) -> Option<&mut State> {
        match exec {
            None => Some(&mut self.init),
            Some(exec) => self.execs.get_mut(exec).map(|exec| &mut exec.state),
        }
    }

    /// Master of a process's terminal.
    pub fn terminal(&self, exec: Option<&str>) -> Option<Arc<OwnedFd>> {
        match exec {
            None => self.terminal.clone(),
            Some(exec) => self.execs.get(exec)?.terminal.clone(),
        }
    }

    /// Which of its processes this is: `Some(None)` for the init process.
    pub fn owner(&self, pid: Pid) -> Option<Option<Arc<str>>> {
        if self.init.pid() == Some(pid) {
            return Some(None);
        }
        self.execs.iter().find(|(_, exec)| exec.state.pid() == Some(pid)).map(|(name, _)| Some(name.clone()))
    }

    /// Whether nothing of it is alive or about to be.
    pub fn is_dead(&self) -> bool {
        let over = |exec: &Exec| exec.state.is_over();
        self.init.pid().is_none() && self.execs.values().all(over)
    }

    /// Whether the OOM killer struck since the last call.
    pub fn oom_is_news(&mut self) -> bool {
        // A group that is not there yet, or no more, had no kill.
        let kills = self.cgroup.oom_kills().unwrap_or(self.oom_kills);
        std::mem::replace(&mut self.oom_kills, kills) < kills
    }
}
