//! What the tests with real processes share: files, a VM's start, and proof that nothing is left.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::time::Duration;

use tempfile::TempDir;
use vmctr_vmm::accel::Accelerator;
use vmctr_vmm::assets::GuestAssets;
use vmctr_vmm::config::{Config, JailConfig, VmDefaults};
use vmctr_vmm::qemu::Qemu;
use vmctr_vmm::run_dir::{Owner, RunDir};
use vmctr_vmm::spec::{Host, Limits, VmSpec};
use vmctr_vmm::vm::{Origin, VmStart};

pub const JAIL: &str = env!("CARGO_BIN_EXE_vmctr-jail");

/// A run directory of its own and everything that a VM needs.
pub struct Rig {
    pub root: TempDir,
    pub run_dir: RunDir,
}

impl Rig {
    pub fn new() -> Self {
        put_jail_beside_the_test();
        let root = tempfile::tempdir().unwrap();
        let owner =
            Owner { namespace: "test".into(), container_id: "vm".into(), bundle: root.path().join("bundle") };
        let run_dir = RunDir::create(&root.path().join("run"), owner).unwrap();
        Self { root, run_dir }
    }

    pub fn start(&self) -> VmStart {
        let defaults = VmDefaults::default();
        let none = HashMap::<String, String>::new();
        VmStart {
            spec: VmSpec::resolve(&defaults, &Limits::default(), &none, &Host::detect()).unwrap(),
            origin: Origin::Boot(Box::new(assets())),
            qemu: Qemu::find(&Config::default()).unwrap(),
            accelerator: Accelerator::Tcg,
            run_dir: self.run_dir.clone(),
            jail: JailConfig::default(),
            share: None,
            share_later: false,
            boot_timeout: Duration::from_secs(60),
        }
    }

    /// Nothing of the VM is left but its metadata. What was dropped rather than stopped goes in the background.
    pub async fn assert_clean(&self) {
        for _ in 0..100 {
            if children().is_empty() && self.files() == ["meta.json"] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("still there: processes {:?}, files {:?}", children(), self.files());
    }

    fn files(&self) -> Vec<OsString> {
        fs::read_dir(self.run_dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }
}

/// The guest that `make build` leaves, or the one named by `VMCTR_GUEST_DIR`.
pub fn assets() -> GuestAssets {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let dir = std::env::var_os("VMCTR_GUEST_DIR").map_or(built, PathBuf::from);
    GuestAssets::open(&dir).expect("guest assets: run `make build` first")
}

/// Child processes of all of this process's threads.
pub fn children() -> Vec<u32> {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

/// The library looks for the jail beside the running executable.
fn put_jail_beside_the_test() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let beside = std::env::current_exe().unwrap().with_file_name("vmctr-jail");
        let fresh = beside.with_extension(std::process::id().to_string());
        copy_program(Path::new(JAIL), &fresh);
        fs::rename(&fresh, beside).unwrap();
    });
}

/// By a process of its own: a copy that this one wrote may still be open for writing in a child that another test has
/// just forked, and cannot be run then.
pub fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").args([from, to]).status().unwrap().success(), "{}", from.display());
}

/// A field of `/proc/PID/status`.
pub fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
}

/// Mount point and options of each mount that the process sees.
pub fn mounts(pid: u32) -> Vec<(String, Vec<String>)> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let mount = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields[4].to_owned(), fields[5].split(',').map(str::to_owned).collect())
    };
    text.lines().map(mount).collect()
}

/// The process is confined as `jail` promises; which resource limits it has is the caller's to check.
pub fn assert_confined(pid: u32) {
    let uid = 1_900_000_000 + pid;
    let four = [uid; 4].map(|uid| uid.to_string()).join("\t");
    assert_eq!(status(pid, "Uid"), four);
    assert_eq!(status(pid, "Gid"), four);
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");

    let mounts = mounts(pid);
    for (point, options) in &mounts {
        let writable = !options.contains(&"ro".to_owned());
        assert!(!writable || point == "/guest/ram", "{point} is writable");
        assert!(options.contains(&"nosuid".to_owned()), "{point} honours set-user-ID");
    }
    let points: Vec<&str> = mounts.iter().map(|(point, _)| point.as_str()).collect();
    for point in &points {
        let system =
            point.starts_with("/usr") || point.starts_with("/lib") || ["/bin", "/sbin"].contains(point);
        let own = ["/", "/dev/null", "/dev/urandom", "/etc/ld.so.cache"];
        assert!(system || own.contains(point) || point.starts_with("/guest/"), "{point} is visible");
    }
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(link("self"), link(&pid.to_string()), "shares the {namespace} namespace");
    }
}
