//! `vmctr commit` when something goes wrong, and against random changes by a real guest.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::{Output, Running, run};
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::image::tree_lines;
use vmctr_tests::rig::vm::signal;

const IMAGE: &str = "vmctr.test/committed:1";

fn vmctr(rig: &Rig, args: &[&str]) -> Output {
    run(rig.vmctr_command().args(args))
}

fn images(rig: &Rig) -> String {
    rig.ctr_run(&["images", "ls", "-q"]).ok().text()
}

#[test]
fn a_commit_killed_at_any_time_leaves_no_image_and_the_container_runs() {
    let rig = Rig::vmctr();
    let container = rig.container("victim").args(["/bin/sleep", "1000"]).detached();
    container.sh("head -c 20000000 /dev/urandom > /big").ok();
    let mut killed = 0;
    for delay in [5, 20, 40, 80, 120, 180, 260, 400, 600] {
        let mut command = rig.vmctr_command();
        command.args(["commit", container.id(), IMAGE]);
        let committer = Running::start(&mut command);
        thread::sleep(Duration::from_millis(delay));
        signal(committer.pid(), Signal::SIGKILL);
        if committer.finish().code() == 0 {
            break;
        }
        killed += 1;
        // Named last: an image that is there is whole.
        if images(&rig).contains(IMAGE) {
            vmctr(&rig, &["layer", "verify", IMAGE]).ok();
            rig.ctr_run(&["images", "rm", "--sync", IMAGE]).ok();
        }
        let leases = rig.ctr_run(&["leases", "ls"]).ok().text();
        let lasting = leases.lines().skip(1).find(|lease| !lease.contains("gc.expire"));
        assert_eq!(lasting, None, "{leases}");
        container.sh("echo goes on").ok().prints("goes on");
    }
    assert!(killed > 2, "{killed}");
    vmctr(&rig, &["commit", "--verify", container.id(), IMAGE]).ok();
    container.remove();
}

#[test]
fn an_interrupted_commit_takes_back_what_it_made() {
    let rig = Rig::vmctr();
    let container = rig.container("interrupted").args(["/bin/sleep", "1000"]).detached();
    container.sh("head -c 60000000 /dev/urandom > /big").ok();
    let out = rig.new_folder("out");
    let snapshots = || rig.ctr_run(&["snapshots", "ls"]).ok().text();
    let (before, blobs) = (snapshots(), rig.ctr_run(&["content", "ls", "-q"]).ok().text());
    let archive = format!("oci-archive:{}", out.join("archive").display());
    let folder = out.join("new").display().to_string();
    for (number, more) in [
        (Signal::SIGINT, vec![]),
        (Signal::SIGTERM, vec!["--output", &archive]),
        (Signal::SIGHUP, vec!["--to-dir", &folder]),
    ] {
        let mut command = rig.vmctr_command();
        // Takes many seconds at this level.
        command.args(["commit", "--compression", "zstd:19"]).args(&more).args([container.id(), IMAGE]);
        let committer = Running::start(&mut command);
        thread::sleep(Duration::from_secs(1));
        signal(committer.pid(), number);
        committer.finish().exits(130).fails_naming(&["Interrupted"]);
        assert!(!images(&rig).contains(IMAGE));
        assert_eq!(snapshots(), before, "{more:?}");
        assert_eq!(rig.ctr_run(&["content", "ls", "-q"]).ok().text(), blobs, "{more:?}");
        assert_eq!(rig.ctr_run(&["content", "active"]).ok().text().lines().count(), 1, "{more:?}");
        assert_eq!(rig.ctr_run(&["leases", "ls", "-q"]).ok().text(), "", "{more:?}");
        container.sh("echo goes on").ok().prints("goes on");
    }
    // The folder was whole before the layer was begun.
    let left: Vec<_> = fs::read_dir(&out).expect("there").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["new"]);
    container.remove();
}

#[test]
fn a_full_content_store_is_named_and_nothing_is_left() {
    let mut rig = Rig::vmctr();
    let id = rig.container("full").args(["/bin/sleep", "1000"]).detached().id().to_owned();
    rig.existing(&id).sh("head -c 40000000 /dev/urandom > /big").ok();
    let content = rig.daemon().root().join("io.containerd.content.v1.content");
    let aside = rig.new_folder("aside");
    rig.stop_containerd();
    run(Command::new("cp").arg("-a").arg(content.join(".")).arg(&aside)).ok();
    mount(Some("tmpfs"), &content, Some("tmpfs"), MsFlags::empty(), Some("size=16m")).expect("tmpfs");
    run(Command::new("cp").arg("-a").arg(aside.join(".")).arg(&content)).ok();
    rig.restart_containerd();
    let snapshots = || rig.ctr_run(&["snapshots", "ls"]).ok().text();
    let (before, blobs) = (snapshots(), rig.ctr_run(&["content", "ls", "-q"]).ok().text());
    vmctr(&rig, &["commit", &id, IMAGE]).exits(125).fails_naming(&["no space left"]);
    assert!(!images(&rig).contains(IMAGE));
    assert_eq!(snapshots(), before);
    assert_eq!(rig.ctr_run(&["content", "ls", "-q"]).ok().text(), blobs);
    assert_eq!(rig.ctr_run(&["content", "active"]).ok().text().lines().count(), 1);
    assert_eq!(rig.ctr_run(&["leases", "ls", "-q"]).ok().text(), "");
    let container = rig.existing(&id);
    container.sh("rm /big; echo goes on").ok().prints("goes on");
    vmctr(&rig, &["commit", "--verify", &id, IMAGE]).ok();
    container.remove();
    umount2(&content, MntFlags::MNT_DETACH).expect("unmounted");
}

/// A place in /t: one to three of a few names.
fn place() -> impl Strategy<Value = String> {
    let name = prop_oneof![Just("a"), Just("b"), Just("a.d"), Just("n l"), Just("$ODD")];
    proptest::collection::vec(name, 1..4).prop_map(|names| format!("\"/t/{}\"", names.join("/")))
}

/// One line of shell. Nothing but regular files is opened: a named pipe would wait.
fn operation() -> impl Strategy<Value = String> {
    let file = |at: &str, then: String| format!("if [ -f {at} ] || [ ! -e {at} ]; then {then}; fi");
    prop_oneof![
        6 => (place(), 0u32..9000).prop_map(move |(at, n)| {
            let write = format!("mkdir -p \"$(dirname {at})\"; head -c {n} /dev/zero | tr '\\0' x > {at}");
            file(&at, write)
        }),
        2 => place().prop_map(move |at| file(&at, format!("echo more >> {at}"))),
        1 => (place(), 0u32..90_000).prop_map(move |(at, n)| file(&at, format!("truncate -s {n} {at}"))),
        3 => place().prop_map(|at| format!("mkdir -p {at}")),
        3 => place().prop_map(|at| format!("rm -rf {at}")),
        2 => place().prop_map(|at| format!("[ -d {at} ] && rm -rf {at} && mkdir {at}")),
        4 => (place(), place()).prop_map(|(from, to)| format!("mv {from} {to}")),
        3 => (place(), place()).prop_map(|(from, to)| format!("ln {from} {to}")),
        1 => (place(), place()).prop_map(|(to, at)| format!("ln -s {to} {at}")),
        2 => (place(), 0u32..0o10000).prop_map(|(at, mode)| format!("[ -L {at} ] || chmod {mode:o} {at}")),
        2 => (place(), 0u32..99_999).prop_map(|(at, id)| format!("chown -h {id}:{id} {at}")),
        1 => (place(), 1u32..2_000_000_000).prop_map(|(at, secs)| format!("touch -c -h -d @{secs} {at}")),
        1 => place().prop_map(|at| format!("mkfifo {at}")),
        1 => place().prop_map(|at| format!("mknod {at} c 7 9")),
        2 => place().prop_map(|at| format!("[ -L {at} ] || {{ chmod u+s {at}; chmod u-s {at}; }}")),
        2 => (place(), 0u8..2, 0usize..600)
            .prop_map(|(at, name, n)| format!("set-xattr {at} user.{name} {}", "v".repeat(n + 1))),
        1 => (place(), 0u8..2).prop_map(|(at, name)| format!("set-xattr {at} remove user.{name}")),
        1 => (place(), 0u8..32).prop_map(|(at, n)| format!("[ -L {at} ] || set-xattr {at} capability {n}")),
    ]
}

fn script() -> impl Strategy<Value = String> {
    proptest::collection::vec(operation(), 10..50)
        .prop_map(|lines| format!("ODD=\"$(printf '\\377\\376')\"; mkdir -p /t; {}; true", lines.join("; ")))
}

/// Commits, checks against the guest, and compares what umoci unpacks with what containerd mounts.
///
/// umoci's `--keep-dirlinks` is not for this: it keeps a symbolic link where the layer says "a folder".
fn check(rig: &Rig, container: &Container<'_>, round: u64) {
    let image = format!("vmctr.test/random:{round}");
    let out = rig.new_folder(&format!("round-{round}"));
    let layout = format!("{}:x", out.join("oci").display());
    let report =
        vmctr(rig, &["--json", "commit", "--verify", "--compression", "gzip", container.id(), &image]).json();
    assert_eq!(report["verified"], true, "{report}");
    let output = format!("oci:{layout}");
    vmctr(rig, &["commit", "--compression", "gzip", "--output", &output, container.id()]).ok();
    let (bundle, mounted) = (out.join("bundle"), out.join("mounted"));
    run(Command::new("umoci").args(["unpack", "--image", &layout]).arg(&bundle)).ok();
    fs::create_dir(&mounted).expect("writable");
    let target = mounted.to_str().expect("text");
    rig.ctr_run(&["images", "mount", &image, target]).ok();
    let by_containerd = tree_lines(&mounted.join("t"));
    rig.ctr_run(&["images", "unmount", "--rm", target]).ok();
    same(&tree_lines(&bundle.join("rootfs/t")), &by_containerd);
}

/// Shows the lines that differ rather than all.
fn same(by_umoci: &[String], by_containerd: &[String]) {
    let only = |some: &[String], others: &[String]| -> Vec<String> {
        some.iter().filter(|line| !others.contains(line)).cloned().collect()
    };
    let (umoci, containerd) = (only(by_umoci, by_containerd), only(by_containerd, by_umoci));
    assert!(umoci.is_empty() && containerd.is_empty(), "umoci: {umoci:#?}, containerd: {containerd:#?}");
}

/// What the random changes of this run follow from: another number each time, unless one is given.
fn seed() -> u64 {
    match env::var("VMCTR_TEST_SEED") {
        Ok(seed) => seed.parse().expect("VMCTR_TEST_SEED is a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").subsec_nanos().into(),
    }
}

/// Random changes, the same for the same seed and round.
fn change(container: &Container<'_>, seed: u64, round: u64) {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&round.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, rng);
    let script = script().new_tree(&mut runner).expect("no value is refused").current();
    println!("round {round}: {script}");
    container.sh(&script).ok();
}

#[test]
fn random_changes_by_a_guest_are_the_same_to_umoci_containerd_and_the_guest() {
    let rig = Rig::vmctr();
    rig.import_busybox(&[("bin/set-xattr", Path::new(env!("CARGO_BIN_EXE_set-xattr")))]);
    let seed = seed();
    // Shown when the test fails.
    println!("VMCTR_TEST_SEED={seed} repeats this");
    let first = rig.container("first").args(["/bin/sleep", "1000"]).detached();
    change(&first, seed, 0);
    // umoci reads no Zstandard.
    vmctr(&rig, &["commit", "--verify", "--compression", "gzip", first.id(), IMAGE]).ok();
    first.remove();
    let second = rig.container_of(IMAGE, "second").args(["/bin/sleep", "1000"]).detached();
    for round in 1..5 {
        change(&second, seed, round);
        check(&rig, &second, round);
    }
    second.remove();
}
