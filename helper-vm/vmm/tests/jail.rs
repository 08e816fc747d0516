//! The jail without QEMU: what a jailed process may do, and what happens when the jail cannot be. Needs root.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{JAIL, assert_confined, status};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use vmctr_vmm::config::FirstUid;
use vmctr_vmm::jail::{EXIT_STATUS, GuestFile, JailSpec, Limits};

const GUEST_FILES: [GuestFile; 3] = [GuestFile::Kernel, GuestFile::Initramfs, GuestFile::Ram];

/// A detached mount with the guest's files, inherited by children under its own number.
fn guest() -> OwnedFd {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::empty()).unwrap();
    fsconfig_create(&tmpfs).unwrap();
    let mount = fsmount(&tmpfs, FsMountFlags::empty(), MountAttrFlags::empty()).unwrap();
    for name in GUEST_FILES.map(GuestFile::name) {
        let file = File::from(openat(&mount, name, OFlags::CREATE | OFlags::WRONLY, Mode::empty()).unwrap());
        (&file).write_all(name.as_bytes()).unwrap();
        // Whoever may write to the file, mounts decide.
        file.set_permissions(fs::Permissions::from_mode(0o666)).unwrap();
    }
    fcntl_setfd(&mount, FdFlags::empty()).unwrap();
    mount
}

fn spec(guest: &OwnedFd, script: &str) -> JailSpec {
    JailSpec {
        parent: std::process::id(),
        first_uid: FirstUid::default(),
        program: PathBuf::from("/usr/bin/bash"),
        prefix: None,
        args: vec!["-c".to_owned(), script.to_owned()],
        guest: guest.as_raw_fd(),
        guest_files: GUEST_FILES.to_vec(),
        fds: vec![],
        limits: Limits { file_size: 1 << 20, open_files: 64, threads: 8 },
    }
}

fn start(spec: &JailSpec) -> Child {
    let argument = serde_json::to_string(spec).unwrap();
    let mut command = Command::new(JAIL);
    command.arg(argument).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn run(script: &str) -> Output {
    start(&spec(&guest(), script)).wait_with_output().unwrap()
}

fn said(script: &str) -> String {
    let output = run(script);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{out}{err}").trim().to_owned()
}

#[test]
fn a_jailed_process_has_nothing_that_it_does_not_need() {
    let mut child = start(&spec(&guest(), "read -t 60 < <(:) ; sleep 60 & wait"));
    let pid = child.id();
    for _ in 0..200 {
        if fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim() == "bash" {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_confined(pid);
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    for (name, value) in
        [("core file size", "0"), ("file size", "1048576"), ("open files", "64"), ("processes", "8")]
    {
        let line = limits.lines().find(|line| line.starts_with(&format!("Max {name} "))).unwrap();
        let values: Vec<&str> = line.split_whitespace().rev().take(3).collect();
        assert_eq!(values[1..], [value, value], "{line}");
    }
    assert_eq!(status(pid, "PPid"), std::process::id().to_string());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn it_sees_the_guests_files_and_the_system_only() {
    assert_eq!(
        said("read -r a < /guest/kernel; read -r b < /guest/initramfs; echo $a $b"),
        "kernel initramfs"
    );
    let top = said("cd /; echo *");
    let allowed = ["bin", "dev", "etc", "guest", "lib", "lib32", "lib64", "libx32", "sbin", "usr"];
    assert!(top.split(' ').all(|name| allowed.contains(&name)), "{top}");
    assert_eq!(said("cd /etc; echo *; cd /dev; echo *"), "ld.so.cache\nnull urandom");
    assert_eq!(said("pwd; echo ${HOME:-unset} ${SECRET:-unset}"), "/\nunset unset");
}

#[test]
fn it_writes_nowhere_but_to_its_guests_memory() {
    assert_eq!(said("echo x > /guest/ram; read -r a < /guest/ram; echo $a"), "x");
    for path in ["/x", "/dev/x", "/guest/kernel", "/guest/x", "/usr/x", "/etc/ld.so.cache"] {
        let message = said(&format!("echo x > {path}"));
        assert!(
            message.contains("Read-only file system") || message.contains("Permission denied"),
            "{message}"
        );
    }
}

#[test]
fn it_has_the_listed_descriptors_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<File> = ["a", "b"].map(|name| File::create(dir.path().join(name)).unwrap()).into();
    let secret = File::create(dir.path().join("secret")).unwrap();
    for file in files.iter().chain([&secret]) {
        fcntl_setfd(file, FdFlags::empty()).unwrap();
    }
    let guest = guest();
    let script = "echo a >&3; echo b >&4; exec 2>/dev/null; \
                  for fd in 5 6 7 8 9 10 11 12 13 14 15 16; do : >&$fd && echo $fd is open; done";
    let fds = files.iter().map(|file| file.as_raw_fd()).collect();
    let output = start(&JailSpec { fds, ..spec(&guest, script) }).wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    for name in ["a", "b"] {
        assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), format!("{name}\n"));
    }
}

#[test]
fn a_jail_that_cannot_be_says_why_in_one_line() {
    // A detached mount can be attached once.
    let (one, other) = (guest(), guest());
    let missing = JailSpec { program: "/usr/bin/nonexistent".into(), ..spec(&one, "") };
    let not_ours = JailSpec { parent: 1, ..spec(&other, "") };
    let no_guest = JailSpec { guest: 9999, ..spec(&one, "") };
    for (spec, want) in [
        (missing, "vmctr-jail: cannot run /usr/bin/nonexistent: No such file or directory (os error 2)\n"),
        (not_ours, "vmctr-jail: cannot die with the parent: the parent is gone\n"),
        (no_guest, "vmctr-jail: cannot put file descriptors in place: Bad file descriptor (os error 9)\n"),
    ] {
        let output = start(&spec).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(EXIT_STATUS));
        assert_eq!(String::from_utf8_lossy(&output.stderr), want);
    }
    let output = Command::new(JAIL).output().unwrap();
    assert_eq!(output.status.code(), Some(EXIT_STATUS));
}

/// The test's own child starts the jail, is killed, and the jailed process must follow.
#[test]
fn it_dies_with_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let guest = guest();
    // The shell's process ID goes where the jail's description wants its parent's.
    let argument = serde_json::to_string(&spec(&guest, "sleep 60 & wait")).unwrap();
    let argument = argument.replace(&format!("\"parent\":{}", std::process::id()), "\"parent\":PARENT");
    let script = format!("{JAIL} \"${{1/PARENT/$$}}\" & echo $! > {}; wait", pid_file.display());
    let mut parent = Command::new("/bin/bash").args(["-c", &script, "bash", &argument]).spawn().unwrap();
    let jailed = wait_for(&pid_file);
    wait_until(|| fs::read_to_string(format!("/proc/{jailed}/comm")).is_ok_and(|comm| comm.trim() == "bash"));
    parent.kill().unwrap();
    assert_eq!(parent.wait().unwrap().signal(), Some(9));
    wait_until(|| !is_running(&jailed));
}

fn wait_for(file: &Path) -> String {
    wait_until(|| fs::read_to_string(file).is_ok_and(|text| text.ends_with('\n')));
    fs::read_to_string(file).unwrap().trim().to_owned()
}

fn is_running(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn wait_until(condition: impl Fn() -> bool) {
    for _ in 0..250 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("waited 5 s in vain");
}
