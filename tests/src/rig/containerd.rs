//! A private containerd: own root, state, socket, plugins and `PATH`, all inside the test's scope.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::{self, eventually};
use super::prerequisites;
use super::scope::Scope;

/// How long containerd may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// Plugins that no test needs and that look for devices or networks of the host.
const DISABLED: [&str; 6] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
];

/// What containerd and its shims log.
#[derive(Clone, Copy, Debug)]
pub enum LogLevel {
    /// All that may explain a failure.
    Debug,
    /// As in use: logging more takes time.
    Info,
}

impl LogLevel {
    fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
        }
    }
}

/// A containerd of the test's own.
pub struct Containerd {
    folder: PathBuf,
    cgroup_procs: PathBuf,
    environment: Vec<(OsString, OsString)>,
    child: Option<Child>,
}

impl Containerd {
    /// Writes the configuration and starts the daemon. Shims get the level and the environment, too.
    pub fn start(scope: &Scope, level: LogLevel, environment: Vec<(OsString, OsString)>) -> Self {
        let folder = scope.folder().join("c");
        fs::create_dir(&folder).expect("the test's folder is writable");
        fs::write(folder.join("config.toml"), config(&folder, level)).expect("the test's folder is writable");
        let mut daemon = Self { folder, cgroup_procs: scope.cgroup_procs(), environment, child: None };
        daemon.launch();
        daemon
    }

    /// Its socket.
    pub fn address(&self) -> PathBuf {
        self.folder.join("sock")
    }

    /// Folder with its content and snapshots.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// Folder of a task's bundle.
    pub fn bundle(&self, namespace: &str, id: &str) -> PathBuf {
        self.folder.join("state/io.containerd.runtime.v2.task").join(namespace).join(id)
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("log")).unwrap_or_default()).into_owned()
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map(Child::id).expect("containerd runs")
    }

    /// Stops it and starts it again on the same folders; shims live on.
    pub fn restart(&mut self) {
        self.stop();
        self.launch();
    }

    /// Asks it to end and waits for that.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // It may have ended by itself; the wait tells.
        let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
        eventually("containerd ends", PATIENCE, || child.try_wait().is_ok_and(|status| status.is_some()));
    }

    fn launch(&mut self) {
        // The shell joins the scope's cgroup, then becomes containerd.
        let script = format!("echo $$ > {} && exec \"$0\" \"$@\"", self.cgroup_procs.display());
        let log = File::options().create(true).append(true).open(self.folder.join("log")).expect("log file");
        let mut daemon = Command::new("sh");
        daemon.args([OsStr::new("-c"), script.as_ref(), prerequisites::program("containerd").as_ref()]);
        daemon.args([OsStr::new("--config"), self.folder.join("config.toml").as_ref()]);
        daemon.envs(self.environment.iter().map(|(name, value)| (name, value)));
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(daemon.spawn().expect("sh starts"));
        self.wait_until_it_answers();
    }

    fn wait_until_it_answers(&mut self) {
        let address = self.address();
        let mut child = self.child.take().expect("just started");
        eventually("containerd answers", PATIENCE, || {
            if let Ok(Some(status)) = child.try_wait() {
                panic!("containerd ended with {status}:\n{}", self.log());
            }
            address.exists() && command::run(self.ctr().arg("version")).code() == 0
        });
        self.child = Some(child);
    }

    /// `ctr` for this containerd.
    pub fn ctr(&self) -> Command {
        let mut ctr = Command::new(prerequisites::program("ctr"));
        ctr.arg("--address").arg(self.address());
        ctr
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn config(folder: &Path, level: LogLevel) -> String {
    let at = |name: &str| format!("{:?}", folder.join(name));
    format!(
        "version = 2\nroot = {}\nstate = {}\ndisabled_plugins = {DISABLED:?}\n\
         [grpc]\naddress = {}\n[ttrpc]\naddress = {}\n[debug]\nlevel = {:?}\n",
        at("root"),
        at("state"),
        at("sock"),
        at("ttrpc"),
        level.as_str()
    )
}
