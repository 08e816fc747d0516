//! How the host processes of a VM are confined, read from /proc while a container runs.

use std::collections::BTreeSet;
use std::fs;

use vmctr_tests::rig::Rig;
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::proc::{self, Mount};
use vmctr_tests::rig::vm::Vm;

/// First user number that QEMUs get when the configuration does not say another.
const FIRST_UID: u32 = 1_900_000;

fn idle(rig: &Rig) -> Container<'_> {
    rig.container("idle").args(["/bin/sleep", "3600"]).detached()
}

#[track_caller]
fn status(pid: u32, field: &str) -> String {
    proc::status_field(pid, field).unwrap_or_else(|| panic!("no {field} of {pid}"))
}

#[track_caller]
fn capabilities(pid: u32, set: &str) -> u64 {
    u64::from_str_radix(&status(pid, set), 16).expect("hex digits")
}

/// Every set of capabilities is within these.
#[track_caller]
fn assert_capabilities_within(pid: u32, allowed: u64) {
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let held = capabilities(pid, set);
        assert_eq!(held & !allowed, 0, "{set} of {} is {held:x}", proc::command_line(pid));
    }
}

/// A filter is on, and no program that it starts can gain rights.
#[track_caller]
fn assert_locked(pid: u32) {
    let program = proc::program(pid);
    assert_eq!(status(pid, "NoNewPrivs"), "1", "of {program}");
    assert_eq!(status(pid, "Seccomp"), "2", "of {program}");
}

#[track_caller]
fn assert_own_namespaces(pid: u32, kinds: &[&str]) {
    for kind in kinds {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("readable");
        assert_ne!(
            of(&pid.to_string()),
            of("self"),
            "{} shares the host's {kind} namespace",
            proc::program(pid)
        );
    }
}

fn root_entries(pid: u32) -> BTreeSet<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/root")).expect("readable").flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn children(pid: u32) -> Vec<u32> {
    proc::all().into_iter().filter(|child| proc::parent(*child) == Some(pid)).collect()
}

#[test]
fn qemu_has_a_user_of_its_own_and_no_rights() {
    let rig = Rig::vmctr();
    let container = idle(&rig);
    let qemu = Vm::of(&rig, container.id()).qemu;
    for field in ["Uid", "Gid"] {
        let ids = status(qemu, field);
        let ids: BTreeSet<u32> = ids.split_whitespace().map(|id| id.parse().expect("a number")).collect();
        assert!(ids.len() == 1 && ids.iter().all(|id| *id >= FIRST_UID), "{field} of QEMU: {ids:?}");
    }
    assert_eq!(status(qemu, "Groups"), "");
    assert_capabilities_within(qemu, 0);
    assert_locked(qemu);
    assert_own_namespaces(qemu, &["mnt", "net", "ipc", "uts"]);
    container.remove();
}

#[test]
fn qemu_sees_read_only_system_files_and_nothing_else() {
    let rig = Rig::vmctr();
    let container = idle(&rig);
    let qemu = Vm::of(&rig, container.id()).qemu;
    let allowed = ["bin", "dev", "etc", "guest", "lib", "lib32", "lib64", "libx32", "sbin", "usr"];
    let allowed: BTreeSet<_> = allowed.map(str::to_owned).into();
    let seen = root_entries(qemu);
    assert!(seen.is_subset(&allowed), "QEMU sees {seen:?}");
    for (folder, expected) in [("etc", &["ld.so.cache"][..]), ("dev", &["null", "urandom"])] {
        let entries = fs::read_dir(format!("/proc/{qemu}/root/{folder}")).expect("readable").flatten();
        let names: BTreeSet<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        assert_eq!(names, expected.iter().map(|name| (*name).to_owned()).collect(), "in {folder}");
    }
    // Its guest's memory is this VM's own, and on no file system of the host.
    let own = |mount: &Mount| mount.point.starts_with("/dev/") || mount.point == "/guest/ram";
    let writable = |mount: &Mount| !mount.has("ro") && !own(mount);
    let writable: Vec<_> = proc::mounts(qemu).into_iter().filter(writable).collect();
    assert!(writable.is_empty(), "QEMU can write to {writable:?}");
    container.remove();
}

#[test]
fn qemu_holds_no_file_or_socket_of_the_host() {
    let rig = Rig::vmctr();
    let container = idle(&rig);
    let qemu = Vm::of(&rig, container.id()).qemu;
    let files = fs::read_dir(format!("/proc/{qemu}/fd")).expect("readable").flatten();
    for file in files.filter_map(|file| fs::read_link(file.path()).ok()) {
        let name = file.to_string_lossy().into_owned();
        let harmless = [
            "socket:",
            "pipe:",
            "anon_inode:",
            "/memfd:",
            "/dev/null",
            "/dev/urandom",
            "/dev/kvm",
            "/guest/",
        ];
        assert!(harmless.iter().any(|start| name.starts_with(start)), "QEMU holds {name}");
    }
    container.remove();
}

#[test]
fn the_share_daemon_has_few_rights() {
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SYS_ADMIN, MKNOD, SETFCAP.
    const SERVER: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 21 | 1 << 27 | 1 << 31;
    let rig = Rig::vmctr();
    let container = idle(&rig);
    let supervisor = Vm::of(&rig, container.id()).fsd;
    let server = children(supervisor);
    assert_eq!(server.len(), 1, "one server process");
    for (pid, allowed) in [(supervisor, 0), (server[0], SERVER)] {
        assert_locked(pid);
        assert_capabilities_within(pid, allowed);
        assert_eq!(status(pid, "Groups"), "");
        assert_own_namespaces(pid, &["mnt", "net", "ipc", "uts"]);
    }
    assert_own_namespaces(server[0], &["pid"]);
    container.remove();
}

#[test]
fn the_share_daemon_sees_the_share_and_nothing_else() {
    let rig = Rig::vmctr();
    let (read_only, writable) = (rig.new_folder("ro"), rig.new_folder("rw"));
    let run = rig.container("idle").bind(&read_only, "/ro", "rbind:ro").bind(&writable, "/rw", "rbind:rw");
    let container = run.args(["/bin/sleep", "3600"]).detached();
    let supervisor = Vm::of(&rig, container.id()).fsd;
    for pid in [supervisor, children(supervisor)[0]] {
        let expected = ["proc", "share", "top", "vol"].map(str::to_owned).into();
        assert_eq!(root_entries(pid), expected);
        let leftover = fs::read_dir(format!("/proc/{pid}/root/proc")).expect("readable").count();
        assert_eq!(leftover, 0, "the host's /proc is not empty");
        assert_mounts_are_the_shares(pid);
    }
    container.remove();
}

#[track_caller]
fn assert_mounts_are_the_shares(pid: u32) {
    let mounts = proc::mounts(pid);
    let access: Vec<_> = mounts.iter().map(|mount| (mount.point.as_str(), mount.has("ro"))).collect();
    let mut expected =
        vec![("/", true), ("/share/lower/0", true), ("/top", false), ("/vol/0", true), ("/vol/1", false)];
    let mut seen = access.clone();
    expected.sort_unstable();
    seen.sort_unstable();
    assert_eq!(seen, expected, "mount points and whether they are read-only");
    for mount in mounts.iter().filter(|mount| mount.point != "/") {
        for option in ["nodev", "nosuid", "noexec", "nosymfollow"] {
            assert!(mount.has(option), "{} lacks {option}: {mount:?}", mount.point);
        }
    }
}

#[test]
fn the_shim_holds_no_more_files_than_it_needs() {
    let rig = Rig::vmctr();
    let container = idle(&rig);
    let shim = Vm::of(&rig, container.id()).shim;
    let before = proc::open_files(shim);
    for round in 0..5 {
        container.exec(&format!("e{round}"), &[], &["/bin/true"]).ok();
    }
    let after = proc::open_files(shim);
    assert!(after <= before + 2, "{before} open files before, {after} after five processes");
    container.remove();
}

#[test]
fn no_port_is_opened_on_the_host() {
    let rig = Rig::vmctr();
    let container = idle(&rig);
    let vm = Vm::of(&rig, container.id());
    for pid in [vm.shim, vm.fsd] {
        let sockets: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("readable")
            .flatten()
            .filter_map(|file| fs::read_link(file.path()).ok())
            .filter_map(|link| {
                link.to_string_lossy().strip_prefix("socket:[")?.strip_suffix(']').map(str::to_owned)
            })
            .collect();
        for table in ["tcp", "tcp6", "udp", "udp6"] {
            let rows = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
            let inodes: BTreeSet<_> = rows.lines().filter_map(|row| row.split_whitespace().nth(9)).collect();
            assert!(
                sockets.iter().all(|inode| !inodes.contains(inode.as_str())),
                "{pid} has a {table} socket"
            );
        }
    }
    container.remove();
}
