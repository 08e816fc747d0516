//! Real VMs: how they start, how they are confined, how they end. Needs root, QEMU and `make build`.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Rig, assert_confined, assets, children, status};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::timeout;
use vmctr_proto::agent::{ContainerRef, HelloRequest};
use vmctr_proto::manifest::{AssetFile, MANIFEST_FILE};
use vmctr_vmm::accel;
use vmctr_vmm::assets::GuestAssets;
use vmctr_vmm::config::Config;
use vmctr_vmm::error_chain;
use vmctr_vmm::qemu::Qemu;
use vmctr_vmm::run_dir::Role;
use vmctr_vmm::spec::{Machine, VmSpec};
use vmctr_vmm::vm::{Origin, Phase, Vm, VmState};

/// One VM at a time, as the tests look at the process's children.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
}

/// The first VM: everything that needs nothing but a VM that runs.
#[tokio::test]
async fn a_vm_starts_pauses_resumes_and_stops() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let vm = Vm::start(rig.start()).await.unwrap();

    assert_eq!(*vm.state().borrow(), VmState::Running);
    assert_eq!(vm.hello().kernel_release, assets().manifest().kernel_release);
    let phases: Vec<Phase> = vm.phases().iter().map(|time| time.phase).collect();
    assert_eq!(phases, [Phase::Spawn, Phase::Boot, Phase::Hello]);
    let recorded = rig.run_dir.meta();
    assert_eq!(
        recorded.processes.last().map(|qemu| (qemu.role, qemu.pid)),
        Some((Role::Qemu, vm.qemu_pid()))
    );

    assert_confined(vm.qemu_pid());
    assert_eq!(status(vm.qemu_pid(), "Seccomp"), "2");
    assert_guest_files_are_freed(vm.qemu_pid());
    talk_over_the_socket(&rig.run_dir.vsock_socket()).await;

    assert!(error_chain(&vm.resume().await.unwrap_err()).contains("The VM is Running"));
    vm.pause().await.unwrap();
    assert_eq!(*vm.state().borrow(), VmState::Paused);
    let mut agent = vm.agent();
    let frozen = timeout(Duration::from_millis(500), agent.hello(HelloRequest::default()));
    assert!(frozen.await.is_err(), "the guest answers while it is paused");
    vm.resume().await.unwrap();
    let answered =
        timeout(Duration::from_secs(20), agent.pids(ContainerRef { container_id: "absent".into() }));
    assert_eq!(answered.await.unwrap().unwrap_err().code(), tonic::Code::NotFound);

    let begin = Instant::now();
    vm.stop().await.unwrap();
    assert!(begin.elapsed() < Duration::from_millis(500), "stopping took {:?}", begin.elapsed());
    assert_eq!(vm.ended().await, VmState::Stopped);
    vm.stop().await.unwrap();
    assert!(vm.pause().await.is_err());
    rig.assert_clean().await;
}

/// None of their pages is in memory any more, neither QEMU's nor the files' own.
fn assert_guest_files_are_freed(qemu: u32) {
    let text = fs::read_to_string(format!("/proc/{qemu}/smaps")).unwrap();
    let mut in_guest_file = false;
    let mut seen = 0;
    for line in text.lines() {
        if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            in_guest_file = line.contains("/guest/kernel") || line.contains("/guest/initramfs");
        } else if in_guest_file && line.starts_with("Rss:") {
            seen += 1;
            assert_eq!(line.split_whitespace().nth(1), Some("0"), "{line}");
        }
    }
    assert!(seen > 0, "QEMU does not map the files, so copying them is no use");
}

async fn talk_over_the_socket(path: &Path) {
    let mut stream = UnixStream::connect(path).await.unwrap();
    stream.write_all(b"CONNECT 1024\n").await.unwrap();
    let mut answer = [0; 3];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"OK ");
}

#[tokio::test]
async fn a_killed_qemu_fails_the_vm() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let vm = Vm::start(rig.start()).await.unwrap();
    kill(vm.qemu_pid());
    let ended = timeout(Duration::from_secs(5), vm.ended()).await.unwrap();
    let VmState::Failed(reason) = ended else { panic!("{ended:?}") };
    assert_eq!(reason, "QEMU ended while the VM was in use (signal: 9 (SIGKILL))");
    vm.stop().await.unwrap();
    rig.assert_clean().await;
}

#[tokio::test]
async fn the_smallest_vm_boots() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    for machine in [Machine::Q35, Machine::Pc] {
        let mut start = rig.start();
        start.spec = VmSpec::smallest(machine);
        Vm::start(start).await.unwrap().stop().await.unwrap();
    }
    rig.assert_clean().await;
}

#[tokio::test]
async fn handles_and_starts_that_are_dropped_leave_nothing() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let given_up = timeout(Duration::from_millis(700), Vm::start(rig.start())).await;
    assert!(given_up.is_err(), "booted within 0.7 s; cannot test");
    rig.assert_clean().await;

    let vm = Vm::start(rig.start()).await.unwrap();
    let state = vm.state();
    drop(vm);
    rig.assert_clean().await;
    assert_eq!(*state.borrow(), VmState::Stopped);
}

#[tokio::test]
async fn a_boot_that_takes_too_long_is_ended() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let mut start = rig.start();
    start.boot_timeout = Duration::from_secs(1);
    let message = Vm::start(start).await.unwrap_err().to_string();
    assert!(message.starts_with("Waited 1 s in vain for the guest to boot"), "{message}");
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_guest_without_an_init_panics_and_the_reason_says_so() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let mut start = rig.start();
    start.origin = Origin::Boot(Box::new(assets_with(rig.root.path(), None, Some(b"no archive at all"))));
    let message = Vm::start(start).await.unwrap_err().to_string();
    assert!(message.starts_with("The guest ended before the VM was ready (exit status: 0)"), "{message}");
    assert!(message.contains("Kernel panic - not syncing"), "{message}");
    rig.assert_clean().await;
}

#[tokio::test]
async fn an_elf_file_that_is_no_kernel_is_refused_by_qemu() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let mut start = rig.start();
    start.origin = Origin::Boot(Box::new(assets_with(
        rig.root.path(),
        Some(b"\x7fELF but no kernel, only its first bytes"),
        None,
    )));
    let message = Vm::start(start).await.unwrap_err().to_string();
    assert!(message.contains("QEMU ended before the VM was ready"), "{message}");
    assert!(message.contains("QEMU last said: "), "{message}");
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_share_daemon_that_is_gone_is_no_hang() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let mut start = rig.start();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(theirs);
    start.share = Some(ours.into());
    let message = Vm::start(start).await.unwrap_err().to_string();
    assert!(message.starts_with("QEMU ended before the VM was ready (exit status: 1)"), "{message}");
    rig.assert_clean().await;
}

/// Whatever the host's /dev/kvm does: an answer in time, the same one from the cache, and no QEMU left.
#[tokio::test]
async fn the_accelerator_is_found_in_time_and_kept() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let config = Config { run_dir: rig.root.path().join("probe"), ..Config::default() };
    let (qemu, assets) = (Qemu::find(&config).unwrap(), assets());
    let (first, second) = tokio::join!(
        accel::resolve(&config, &assets, &qemu),
        timeout(accel::PROBE_LIMIT + Duration::from_secs(5), accel::resolve(&config, &assets, &qemu)),
    );
    let first = first.unwrap();
    assert_eq!(first, second.expect("no answer in time").unwrap());
    assert!(children().is_empty());

    let kept = || fs::metadata(config.run_dir.join("accel.json")).ok().map(|file| file.ino());
    let before = kept();
    assert_eq!(accel::resolve(&config, &assets, &qemu).await.unwrap(), first);
    assert_eq!(kept(), before, "probed again");
    let mut left: Vec<_> =
        fs::read_dir(&config.run_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    if Path::new("/dev/kvm").exists() {
        // Probing is booting.
        assert_eq!(left, ["accel.json", "accel.lock", "keys.lock"]);
    } else {
        assert_eq!(left, [""; 0]);
    }
}

/// The real assets with other contents of a file.
fn assets_with(dir: &Path, kernel: Option<&[u8]>, initramfs: Option<&[u8]>) -> GuestAssets {
    let real = assets();
    let mut manifest = real.manifest().clone();
    let put = |source: &Path, contents: Option<&[u8]>, asset: &mut AssetFile| {
        let bytes = contents.map_or_else(|| fs::read(source).unwrap(), <[u8]>::to_vec);
        asset.size = bytes.len() as u64;
        asset.sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(dir.join(&asset.file), bytes).unwrap();
    };
    put(&real.kernel(), kernel, &mut manifest.kernel);
    put(&real.initramfs(), initramfs, &mut manifest.initramfs);
    fs::write(dir.join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
    GuestAssets::open(dir).unwrap()
}
