//! A guest whose agent means harm: the create fails in time or the container can be removed, the shim does not
//! grow, its words do not reach a terminal unchecked, and nothing is left.
//!
//! Packets that no guest kernel would send are tried in the tests of the vsock device itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;
use vmctr_tests::rig::command::{Output, run};
use vmctr_tests::rig::{Rig, prerequisites, proc};

/// How long the guest may take to boot in these tests.
const BOOT_LIMIT: u64 = 15;

/// Anonymous memory of a shim that does not hoard.
const SHIM_LIMIT: u64 = 96 << 20;

/// A guest whose agent has this mode.
struct Guest(TempDir);

impl Guest {
    fn with_mode(mode: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let agent = folder.path().join("agent");
        let mut program = fs::read(env!("CARGO_BIN_EXE_hostile-agent")).expect("cargo builds it");
        program.extend(format!("MODE={mode}").bytes());
        fs::write(&agent, program).expect("writable");
        let mut build = Command::new(prerequisites::binary("vmctr"));
        build.args(["guest", "build", "--deb"]).arg(prerequisites::kernel_package());
        run(build.arg("--agent").arg(&agent).arg("--out").arg(folder.path().join("guest"))).ok();
        Self(folder)
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("guest")
    }
}

fn rig(guest: &Guest) -> Rig {
    let config = format!("[vm]\naccelerator = \"tcg\"\nboot_timeout_seconds = {BOOT_LIMIT}\n");
    Rig::vmctr_booting(&config, &guest.dir())
}

/// Watches how much memory the rig's shims take.
struct Watch {
    stop: Arc<AtomicBool>,
    most: JoinHandle<u64>,
}

impl Watch {
    fn start(rig: &Rig) -> Self {
        let (stop, tag) = (Arc::new(AtomicBool::new(false)), rig.tag().to_owned());
        let stopped = Arc::clone(&stop);
        let most = thread::spawn(move || {
            let mut most = 0;
            while !stopped.load(Ordering::Relaxed) {
                most = most.max(shims(&tag).into_iter().filter_map(anonymous).max().unwrap_or(0));
                thread::sleep(Duration::from_millis(100));
            }
            most
        });
        Self { stop, most }
    }

    #[track_caller]
    fn assert_small(self) {
        self.stop.store(true, Ordering::Relaxed);
        let most = self.most.join().expect("the watcher does not panic");
        assert!(most > 0, "no shim was seen");
        assert!(most < SHIM_LIMIT, "the shim took {} MiB", most >> 20);
    }
}

fn shims(tag: &str) -> Vec<u32> {
    // The kernel cuts names at 15 bytes.
    let is_shim = |pid: &u32| proc::program(*pid).starts_with("containerd-shim") && proc::mentions(*pid, tag);
    proc::all().into_iter().filter(is_shim).collect()
}

fn anonymous(pid: u32) -> Option<u64> {
    let text = proc::status_field(pid, "RssAnon")?;
    text.split_whitespace().next()?.parse().ok().map(|kib: u64| kib * 1024)
}

/// The create fails within the limit, without hoarding, and with words that a terminal can show.
#[track_caller]
fn assert_fails_within(mode: &str, limit: Duration) -> Output {
    let guest = Guest::with_mode(mode);
    let rig = rig(&guest);
    let watch = Watch::start(&rig);
    let output = rig.container("victim").sh("echo started").output().fails_naming(&[]);
    watch.assert_small();
    assert!(output.took < limit, "{output} took {:?}", output.took);
    assert!(!output.text().contains("started"), "{output}");
    assert_clean(&output);
    output
}

#[track_caller]
fn assert_clean(output: &Output) {
    let errors = output.errors();
    assert!(errors.len() < 4096, "{} bytes of errors", errors.len());
    assert!(
        errors.chars().all(|char| char == '\n' || !char.is_control()),
        "control characters in {errors:?}"
    );
}

const SOON: Duration = Duration::from_secs(45);

#[test]
fn a_guest_that_never_gets_ready_is_given_up() {
    assert_fails_within("never-ready", SOON).fails_naming(&["VM", &BOOT_LIMIT.to_string()]);
}

#[test]
fn a_guest_whose_agent_dies_is_given_up() {
    assert_fails_within("exits", SOON).fails_naming(&["VM"]);
}

#[test]
fn a_guest_that_only_prints_is_given_up() {
    assert_fails_within("prints", SOON);
}

#[test]
fn an_agent_that_does_not_answer_is_given_up() {
    assert_fails_within("silence", SOON);
    assert_fails_within("close", SOON);
}

#[test]
fn bytes_that_are_no_grpc_are_refused() {
    assert_fails_within("garbage", SOON);
}

#[test]
fn floods_of_frames_are_given_up() {
    assert_fails_within("settings", SOON);
    assert_fails_within("pings", SOON);
    assert_fails_within("headers", SOON);
}

#[test]
fn a_guest_that_dials_without_end_is_given_up() {
    assert_fails_within("dials", SOON);
}

#[test]
fn another_protocol_is_refused_by_its_number() {
    assert_fails_within("version", SOON).fails_naming(&["protocol", "99"]);
}

#[test]
fn an_answer_that_is_too_large_is_refused() {
    assert_fails_within("huge", SOON);
}

#[test]
fn a_refusal_full_of_terminal_controls_is_cleaned() {
    assert_fails_within("message", SOON).fails_naming(&["lies"]);
}

#[test]
fn a_create_that_never_ends_is_given_up() {
    assert_fails_within("hang", Duration::from_secs(140));
}

#[test]
fn events_out_of_order_end_the_container() {
    let guest = Guest::with_mode("sequence");
    let rig = rig(&guest);
    rig.container("victim").sh("true").output().fails_naming(&[]);
}

/// The guest agrees to everything and never says that the container has ended; all else it says is too much.
fn assert_removable(mode: &str) {
    let guest = Guest::with_mode(mode);
    let rig = rig(&guest);
    let watch = Watch::start(&rig);
    let container = rig.container("victim").sh("true").detached();
    thread::sleep(Duration::from_secs(5));
    assert_clean(&container.task("ps", &[]));
    assert_clean(&container.task("metrics", &[]));
    let begun = std::time::Instant::now();
    container.remove();
    assert!(begun.elapsed() < SOON, "removing took {:?}", begun.elapsed());
    watch.assert_small();
}

#[test]
fn events_without_end_do_not_fill_the_host() {
    assert_removable("events");
}

#[test]
fn lists_without_end_do_not_fill_the_host() {
    assert_removable("pids");
}

#[test]
fn output_without_end_can_be_cut_off() {
    let guest = Guest::with_mode("pids");
    let rig = rig(&guest);
    let run = rig.container("victim").sh("true");
    let id = run.id().to_owned();
    let watch = Watch::start(&rig);
    let mut command = run.command();
    let ctr = vmctr_tests::rig::command::Running::start_with(
        command
            .stdin(std::process::Stdio::null())
            .stdout(fs::File::create(Path::new("/dev/null")).expect("opens")),
    );
    let container = rig.existing(&id);
    container.wait_for("RUNNING");
    thread::sleep(Duration::from_secs(5));
    container.task("delete", &["--force"]);
    // It removes its container.
    ctr.finish();
    watch.assert_small();
}

#[test]
fn an_agent_that_cannot_serve_its_root_is_named() {
    let guest = Guest::with_mode("pids");
    let rig = rig(&guest);
    let container = rig.container("victim").sh("true").detached();
    let dir = rig.new_folder("mnt");
    let refused = run(rig.vmctr_command().args(["mount", container.id()]).arg(&dir));
    assert!(refused.code() == 125 && refused.errors().contains("earlier release"), "{refused}");
    container.remove();
}
