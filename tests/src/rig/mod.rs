//! What an end-to-end test stands on: a private containerd, a runtime under test, images, and the proof that nothing
//! is left at the end.
//!
//! ```text
//!   Rig ──> Scope       tag, folder, cgroup; finds and wipes leftovers
//!       ──> Containerd  private daemon in the scope
//!       ──> Run         one `ctr run`, built up flag by flag
//!             └──> Container   a detached one: exec, kill, pause, ...
//! ```
//!
//! A test makes a rig, does its work through stock `ctr`, and drops it. Dropping checks first that the test removed
//! its containers and that no process, mount, socket, cgroup or run directory is left; then wipes whatever is there.

pub mod api;
pub mod command;
pub mod container;
pub mod containerd;
pub mod events;
pub mod image;
pub mod interrupt;
pub mod prerequisites;
pub mod proc;
pub mod scope;
pub mod slots;
pub mod stream;
pub mod terminal;
pub mod vm;

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use command::Output;
use container::{Container, Run};
use containerd::{Containerd, LogLevel};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use scope::{Scope, shim_socket};
use serde_json::{Value, json};
use slots::Slot;

/// Runtime name of the shim under test.
pub const VMCTR: &str = "io.containerd.vmctr.v2";

/// Runtime that the rig proves itself against.
pub const RUNC: &str = "io.containerd.runc.v2";

/// containerd namespace of all tests.
pub const NAMESPACE: &str = "default";

/// A private containerd with one runtime, ready to run containers.
pub struct Rig {
    runtime: &'static str,
    ids: RefCell<Vec<String>>,
    daemon: Containerd,
    scope: Scope,
    _slot: Slot,
}

impl Rig {
    /// A rig whose containers run in VMs, and the busybox image.
    pub fn vmctr() -> Self {
        Self::vmctr_with("")
    }

    /// The same with further lines of vmctr's configuration.
    pub fn vmctr_with(config: &str) -> Self {
        let guest_dir = prerequisites::guest_dir();
        Self::vmctr_booting(config, &guest_dir)
    }

    /// The same with another guest.
    pub fn vmctr_booting(config: &str, guest_dir: &Path) -> Self {
        prerequisites::binary("containerd-shim-vmctr-v2");
        let environment = |config_file: &Path| environment(config_file, guest_dir);
        let rig = Self::start(VMCTR, config, LogLevel::Debug, environment);
        rig.import_busybox(&[]);
        if config.is_empty() {
            rig.make_template();
        }
        rig
    }

    /// Makes the template that tests share, unless it is there. A guest that cannot be saved has none.
    fn make_template(&self) {
        command::run(self.vmctr_command().args(["template", "create"]));
    }

    /// A rig whose containers run under runc, and the busybox image.
    pub fn runc() -> Self {
        let rig = Self::start(RUNC, "", LogLevel::Debug, |_| Vec::new());
        rig.import_busybox(&[]);
        rig
    }

    /// A rig for measuring: as [`Rig::vmctr`], but it logs no more than in use, and a pool may keep one VM.
    pub fn measuring() -> Self {
        let guest_dir = prerequisites::guest_dir();
        prerequisites::binary("containerd-shim-vmctr-v2");
        let pool = "[pool]\nsize = 1\n";
        let rig = Self::start(VMCTR, pool, LogLevel::Info, |config| environment(config, &guest_dir));
        rig.import_busybox(&[]);
        rig.make_template();
        rig
    }

    fn start(
        runtime: &'static str,
        config: &str,
        level: LogLevel,
        environment: impl FnOnce(&Path) -> Vec<(OsString, OsString)>,
    ) -> Self {
        prerequisites::root();
        let slot = Slot::take();
        let scope = Scope::new();
        fs::create_dir(run_dir(&scope)).expect("the test's folder is writable");
        let config_file = scope.folder().join("vmctr.toml");
        let templates = template_dir(&scope, config);
        let text = format!("run_dir = {:?}\ntemplate_dir = {templates:?}\n{config}", run_dir(&scope));
        fs::write(&config_file, text).expect("the test's folder is writable");
        let daemon = Containerd::start(&scope, level, environment(&config_file));
        Self { runtime, ids: RefCell::default(), daemon, scope, _slot: slot }
    }

    /// The runtime's name.
    pub fn runtime(&self) -> &'static str {
        self.runtime
    }

    /// What marks all that belongs to the test.
    pub fn tag(&self) -> &str {
        self.scope.tag()
    }

    /// The test's folder.
    pub fn folder(&self) -> &Path {
        self.scope.folder()
    }

    /// Folder that the shim keeps its run directories in.
    pub fn run_dir(&self) -> PathBuf {
        run_dir(&self.scope)
    }

    /// The containerd.
    pub fn daemon(&self) -> &Containerd {
        &self.daemon
    }

    /// Stops containerd; shims live on.
    pub fn stop_containerd(&mut self) {
        self.daemon.stop();
    }

    /// Stops containerd, if it runs, and starts it again; shims live on.
    pub fn restart_containerd(&mut self) {
        self.daemon.restart();
    }

    /// A new folder for the test's own use.
    pub fn new_folder(&self, name: &str) -> PathBuf {
        let folder = self.folder().join(name);
        fs::create_dir(&folder).unwrap_or_else(|e| panic!("cannot make {}: {e}", folder.display()));
        folder
    }

    /// A container ID that belongs to this test.
    pub fn id(&self, name: &str) -> String {
        let id = format!("{}-{name}", self.scope.tag());
        self.ids.borrow_mut().push(id.clone());
        id
    }

    /// A container to run from the busybox image.
    pub fn container(&self, name: &str) -> Run<'_> {
        Run::from_image(self, self.id(name), image::BUSYBOX)
    }

    /// A container to run from another image.
    pub fn container_of(&self, image: &str, name: &str) -> Run<'_> {
        Run::from_image(self, self.id(name), image)
    }

    /// A container to run from a folder.
    pub fn container_in(&self, root: &Path, name: &str) -> Run<'_> {
        Run::from_folder(self, self.id(name), root)
    }

    /// A container to run by an OCI specification: a default one with a busybox root, changed by the caller.
    pub fn container_by_spec(&self, name: &str, change: impl FnOnce(&mut Value)) -> Run<'_> {
        let id = self.id(name);
        let mut spec = self.ctr_run(&["oci", "spec"]).ok().json();
        spec["root"] = json!({"path": self.busybox_root(&format!("root-{name}"), &[])});
        spec["process"]["terminal"] = false.into();
        spec["process"]["env"] = json!(["PATH=/bin"]);
        spec["linux"]["cgroupsPath"] = format!("/{NAMESPACE}/{id}").into();
        change(&mut spec);
        let file = self.folder().join(format!("spec-{name}.json"));
        fs::write(&file, spec.to_string()).expect("the test's folder is writable");
        Run::from_spec(self, id, &file)
    }

    /// A container that is there already.
    pub fn existing(&self, id: &str) -> Container<'_> {
        Container::of(self, id)
    }

    /// `ctr` for this containerd.
    pub fn ctr(&self) -> Command {
        let mut ctr = self.daemon.ctr();
        ctr.args(["--namespace", NAMESPACE]);
        ctr
    }

    /// Runs `ctr` with these arguments.
    pub fn ctr_run(&self, args: &[&str]) -> Output {
        command::run(self.ctr().args(args))
    }

    /// `vmctr` with this rig's configuration and containerd.
    pub fn vmctr_command(&self) -> Command {
        let mut vmctr = Command::new(prerequisites::binary("vmctr"));
        vmctr.envs(environment(&self.folder().join("vmctr.toml"), &prerequisites::guest_dir()));
        vmctr.arg("--address").arg(self.daemon.address()).args(["--namespace", NAMESPACE]);
        vmctr
    }

    /// What `vmctr inspect` says about a container.
    pub fn inspect(&self, id: &str) -> serde_json::Value {
        command::run(self.vmctr_command().args(["--json", "inspect", id])).ok().json()
    }

    /// Imports the busybox image with these further executables.
    pub fn import_busybox(&self, extra: &[(&str, &Path)]) {
        let archive = self.folder().join("busybox.tar");
        let root = self.busybox_root("image", extra);
        image::write_archive(&root, image::BUSYBOX, &archive);
        fs::remove_dir_all(root).expect("just written");
        self.import(&archive);
    }

    /// A folder with a busybox root file system.
    pub fn busybox_root(&self, name: &str, extra: &[(&str, &Path)]) -> PathBuf {
        let root = self.new_folder(name);
        image::write_root(&root, extra);
        root
    }

    /// Imports an archive; returns the names of its images.
    pub fn import(&self, archive: &Path) -> Vec<String> {
        command::run(self.ctr().args(["images", "import"]).arg(archive)).ok();
        let list = self.ctr_run(&["images", "list", "--quiet"]).ok();
        list.text().lines().map(str::to_owned).collect()
    }

    /// What is left of the test: containers, then all that carries its tag.
    fn leftovers(&mut self) -> Vec<String> {
        let mut left = self.containers();
        self.daemon.stop();
        self.end_makers();
        left.extend(self.scope.leftovers());
        left.extend(self.files());
        left
    }

    /// A template that is being made for a later container is no leftover; whoever makes it may be killed.
    fn end_makers(&self) {
        for pid in self.makers() {
            // It may have ended meanwhile.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }

    /// Processes that make templates for this rig's containers.
    pub fn makers(&self) -> Vec<u32> {
        let makes = |pid: &u32| proc::command_line(*pid).contains("vmctr template create");
        self.scope.processes().into_iter().filter(makes).collect()
    }

    fn containers(&self) -> Vec<String> {
        let list = self.ctr_run(&["containers", "list", "--quiet"]).ok().text();
        list.lines().map(|id| format!("container {id}")).collect()
    }

    fn files(&self) -> Vec<String> {
        let ids = self.ids.borrow();
        let sockets = ids.iter().map(|id| shim_socket(&self.daemon.address(), NAMESPACE, id));
        let bundles = ids.iter().map(|id| self.daemon.bundle(NAMESPACE, id));
        let gone = sockets.chain(bundles).filter(|path| path.exists());
        gone.chain(run_directories(&self.run_dir())).map(|path| format!("file {}", path.display())).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if interrupt::happened() {
            self.forget_sockets();
            return;
        }
        if std::thread::panicking() {
            eprintln!("-- end of containerd's log\n{}", tail(&self.daemon.log(), 60));
            self.forget_sockets();
            return;
        }
        let left = self.leftovers();
        self.forget_sockets();
        assert!(left.is_empty(), "the test left behind:\n{}", left.join("\n"));
    }
}

impl Rig {
    /// The scope wipes what lies in its folder; these lie elsewhere.
    fn forget_sockets(&self) {
        for id in self.ids.borrow().iter() {
            // Mostly there is none.
            let _ = fs::remove_file(shim_socket(&self.daemon.address(), NAMESPACE, id));
        }
    }
}

fn run_dir(scope: &Scope) -> PathBuf {
    scope.folder().join("run")
}

/// One for all tests, as making a template takes seconds; its own for a test that is about templates.
fn template_dir(scope: &Scope, config: &str) -> PathBuf {
    if config.contains("start = \"template\"") {
        return scope.folder().join("templates");
    }
    prerequisites::template_dir()
}

/// Folders in the run directory: one per VM. Plain files are caches that outlive a VM.
fn run_directories(run_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(run_dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn environment(config_file: &Path, guest_dir: &Path) -> Vec<(OsString, OsString)> {
    let old = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(prerequisites::bin_dir()).chain(std::env::split_paths(&old));
    let path = std::env::join_paths(path).expect("the folder's name has no colon");
    vec![
        ("PATH".into(), path),
        ("VMCTR_CONFIG".into(), config_file.into()),
        ("VMCTR_GUEST_DIR".into(), guest_dir.into()),
    ]
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
