//! The daemon as a process: how it starts, how it is confined, how it ends. Needs root, no VM.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmctr_fileshare::share::{Exit, Fsd, ShareSpec, SpawnError, Top, Volume, spawn};

const BINARY: &str = env!("CARGO_BIN_EXE_vmctr-fsd");

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SYS_ADMIN, MKNOD, SETFCAP.
const SERVER_CAPABILITIES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 21 | 1 << 27 | 1 << 31;

/// Set for the process that plays a caller.
const CALLER: &str = "VMCTR_TEST_CALLER";

struct Rig {
    dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["lower", "snap/fs", "snap/work", "vol", "run"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("hosts"), "127.0.0.1 localhost\n").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self) -> ShareSpec {
        let volume = |name, read_only| Volume { source: self.path(name), read_only, recursive: true };
        ShareSpec {
            lowers: vec![self.path("lower")],
            top: Top::Overlay { upper: self.path("snap/fs"), work: self.path("snap/work") },
            volumes: vec![volume("vol", false), volume("hosts", true)],
            ..ShareSpec::new()
        }
    }

    fn start(&self, spec: &ShareSpec) -> Result<Fsd, SpawnError> {
        spawn(Path::new(BINARY), spec, &self.path("run"), "info")
    }
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn server_of(fsd: &Fsd) -> u32 {
    let children = children(fsd.pid());
    assert_eq!(children.len(), 1);
    children[0]
}

fn status_field(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in the status")).trim().to_owned()
}

fn capabilities(pid: u32, set: &str) -> u64 {
    u64::from_str_radix(&status_field(pid, set), 16).unwrap()
}

fn within_seconds(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_gone(pid: u32) -> bool {
    // A zombie of ours would be a process that nobody reaped.
    !Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn the_server_is_confined() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    let server = server_of(&fsd);
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(capabilities(server, set), SERVER_CAPABILITIES, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(capabilities(server, set), 0, "{set}");
    }
    assert_eq!(status_field(server, "Seccomp"), "2");
    assert_eq!(status_field(server, "NoNewPrivs"), "1");
    assert_eq!(status_field(server, "Groups"), "");
    assert!(status_field(server, "NSpid").ends_with("\t1"), "not PID 1 of a namespace of its own");
}

#[test]
fn the_supervisor_may_do_nothing() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
        assert_eq!(capabilities(fsd.pid(), set), 0, "{set}");
    }
    assert_eq!(status_field(fsd.pid(), "Seccomp"), "2");
    assert_eq!(status_field(fsd.pid(), "NoNewPrivs"), "1");
}

#[test]
fn namespaces_are_not_the_hosts() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    let namespace = |pid: &str, kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let server = server_of(&fsd).to_string();
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        assert_ne!(namespace(&server, kind), namespace("self", kind), "{kind}");
    }
}

#[test]
fn only_the_share_is_mounted() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    for pid in [server_of(&fsd), fsd.pid()] {
        let mountinfo = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        let mut points = BTreeSet::new();
        for line in mountinfo.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            let (point, options) = (fields[4], fields[5]);
            points.insert(point);
            for option in ["nodev", "nosuid", "noexec", "nosymfollow"] {
                assert!(options.split(',').any(|o| o == option), "{point} is not {option}: {options}");
            }
            let writable = ["/top", "/vol/0"].contains(&point);
            assert_eq!(options.split(',').any(|o| o == "rw"), writable, "{point}: {options}");
            assert!(!line.contains("shared:") && !line.contains("master:"), "{point} is not private");
        }
        assert_eq!(points, BTreeSet::from(["/", "/share/lower/0", "/top", "/vol/0", "/vol/1"]));
    }
}

#[test]
fn no_descriptor_leads_out() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    for entry in fs::read_dir(format!("/proc/{}/fd", server_of(&fsd))).unwrap() {
        let entry = entry.unwrap();
        // One that it has closed since leads nowhere.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        let name = entry.file_name();
        let inside = ["/", "/share", "/top", "/vol", "/vol/0", "/1/fd"].contains(&&*target)
            || ["pipe:", "socket:", "anon_inode:"].iter().any(|kind| target.starts_with(kind));
        // Standard input and output are /dev/null.
        let standard = target == "/dev/null" && (name == "0" || name == "1");
        assert!(inside || standard, "descriptor {name:?} is {target}");
    }
}

#[test]
fn killing_the_daemon_leaves_no_process() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    let (supervisor, server) = (fsd.pid(), server_of(&fsd));
    fsd.kill().unwrap();
    assert_eq!(fsd.wait(), Exit::Signal(9));
    within_seconds("the end of the supervisor", || is_gone(supervisor));
    within_seconds("the end of the server", || is_gone(server));
}

#[test]
fn the_end_of_the_server_is_passed_on() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    let server = rustix::process::Pid::from_raw(i32::try_from(server_of(&fsd)).unwrap()).unwrap();
    rustix::process::kill_process(server, rustix::process::Signal::KILL).unwrap();
    assert_eq!(fsd.wait(), Exit::Code(128 + 9));
}

#[test]
fn the_daemon_ends_when_the_connection_does() {
    let rig = Rig::new();
    let mut fsd = rig.start(&rig.spec()).unwrap();
    let server = server_of(&fsd);
    drop(fsd.socket.take());
    assert_eq!(fsd.wait(), Exit::Code(0));
    within_seconds("the end of the server", || is_gone(server));
    let log: Vec<_> = BufReader::new(fsd.stderr.take().unwrap()).lines().map(Result::unwrap).collect();
    assert!(log.iter().any(|line| line.contains("QEMU closed the connection")), "{log:?}");
}

#[test]
fn dropping_the_handle_ends_the_daemon() {
    let rig = Rig::new();
    let fsd = rig.start(&rig.spec()).unwrap();
    let server = server_of(&fsd);
    drop(fsd);
    within_seconds("the end of the server", || is_gone(server));
}

#[test]
fn the_daemon_outlives_the_thread_that_asked_for_it() {
    let rig = Rig::new();
    let fsd = std::thread::scope(|scope| scope.spawn(|| rig.start(&rig.spec()).unwrap()).join().unwrap());
    std::thread::sleep(Duration::from_millis(200));
    assert!(!is_gone(server_of(&fsd)));
}

/// Not a test of its own: the process that [`the_daemon_dies_with_its_caller`] kills.
#[test]
fn caller_to_be_killed() {
    if std::env::var_os(CALLER).is_some() {
        let rig = Rig::new();
        let fsd = rig.start(&rig.spec()).unwrap();
        println!("started {} {} {}", fsd.pid(), server_of(&fsd), rig.dir.path().display());
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn the_daemon_dies_with_its_caller() {
    let mut caller = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "caller_to_be_killed", "--nocapture"])
        .env(CALLER, "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(caller.stdout.take().unwrap()).lines().map(Result::unwrap);
    let started = lines.find_map(|line| Some(line.split_once("started ")?.1.to_owned())).unwrap();
    caller.kill().unwrap();
    caller.wait().unwrap();
    let mut words = started.split(' ');
    for _ in 0..2 {
        let pid = words.next().unwrap().parse().unwrap();
        within_seconds("the end of the daemon", || {
            is_gone(pid) || status_field(pid, "State").starts_with('Z')
        });
    }
    fs::remove_dir_all(words.next().unwrap()).unwrap();
}

#[test]
fn no_file_is_left_beside_the_daemon() {
    let rig = Rig::new();
    let _fsd = rig.start(&rig.spec()).unwrap();
    assert_eq!(fs::read_dir(rig.path("run")).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_shared_is_named() {
    let rig = Rig::new();
    let refusal = |change: &dyn Fn(&mut ShareSpec)| {
        let mut spec = rig.spec();
        change(&mut spec);
        rig.start(&spec).unwrap_err().to_string()
    };
    let missing = refusal(&|spec| spec.lowers.push("/no/such/layer".into()));
    assert_eq!(
        missing,
        "cannot share files with the VM: cannot open lower layer /no/such/layer: No such file or directory (os error 2)"
    );
    let device = refusal(&|spec| spec.volumes[0].source = "/dev/zero".into());
    assert!(
        device.ends_with("volume /dev/zero is a device; only a folder or a regular file can be shared here")
    );
    let relative = refusal(&|spec| spec.lowers.push("layer".into()));
    assert_eq!(relative, "layer is not an absolute path");
    let nested = refusal(&|spec| {
        spec.top = Top::Overlay { upper: rig.path("snap"), work: rig.path("snap/work") };
    });
    assert!(nested.contains("neither inside the other"), "{nested}");
}

#[test]
fn a_daemon_without_its_caller_says_so() {
    let output = std::process::Command::new(BINARY).stdin(std::process::Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("start vmctr-fsd through the shim"), "{log}");
}

#[test]
fn a_plain_folder_is_shared_as_root() {
    let rig = Rig::new();
    let mounts = |read_only| {
        let top = Top::Folder { path: rig.path("vol"), read_only };
        let fsd = rig.start(&ShareSpec { top, ..ShareSpec::new() }).unwrap();
        fs::read_to_string(format!("/proc/{}/mountinfo", fsd.pid())).unwrap()
    };
    let root_is = |mountinfo: &str, option: &str| {
        mountinfo.lines().any(|line| line.contains(&format!(" /share/root {option},")))
    };
    assert!(root_is(&mounts(false), "rw"));
    assert!(root_is(&mounts(true), "ro"));
}
