//! Templates end to end at this crate's level: made once, restored many times, and every way in which one can
//! be unusable. Needs root, QEMU and the guest assets.

// Helpers of tests are tests too; clippy's own exception stops at #[test] functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Rig, assert_confined, assets, children};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::sync::Mutex;
use tokio::time::timeout;
use vmctr_proto::agent::ContainerRef;
use vmctr_vmm::accel::Accelerator;
use vmctr_vmm::config::{Config, JailConfig};
use vmctr_vmm::error_chain;
use vmctr_vmm::qemu::Qemu;
use vmctr_vmm::spec::{Machine, VmSpec};
use vmctr_vmm::template::{Key, Maker, Store, TemplateError, make, make_or_wait};
use vmctr_vmm::vm::{Origin, Phase, Vm, VmStart, VmState};

/// One VM at a time, as the tests look at the process's children.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn store(dir: &Path) -> Store {
    Store::new(&Config { template_dir: Some(dir.to_owned()), ..Config::default() })
}

fn maker(rig: &Rig) -> Maker {
    let VmStart { spec, qemu, .. } = rig.start();
    Maker {
        spec,
        assets: assets(),
        qemu,
        accelerator: Accelerator::Tcg,
        jail: JailConfig::default(),
        boot_timeout: Duration::from_secs(60),
    }
}

/// The template for the rig's VMs, in a store that outlives the tests: making one takes seconds.
async fn made(rig: &Rig) -> (Store, Key) {
    let store = store(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("templates"));
    let key = make(&maker(rig), &store).await.unwrap();
    (store, key)
}

/// A copy to be damaged.
async fn copied(rig: &Rig) -> (Store, Key, PathBuf) {
    let (made, key) = made(rig).await;
    let dir = rig.root.path().join("templates").join(key.as_str());
    fs::create_dir_all(&dir).unwrap();
    for file in ["manifest", "state", "ram"] {
        fs::copy(made.path(&key).join(file), dir.join(file)).unwrap();
    }
    (store(&rig.root.path().join("templates")), key, dir)
}

/// What makers have left of their VMs, besides the lock that VMs' directories are claimed under.
fn left(store: &Store) -> Vec<OsString> {
    let all = fs::read_dir(store.dir().join("run")).expect("a VM was started there");
    all.map(|entry| entry.expect("readable").file_name()).filter(|name| name != "keys.lock").collect()
}

fn restored(rig: &Rig, store: &Store, key: &Key) -> VmStart {
    let template = store.open(key).unwrap().expect("a template");
    VmStart { origin: Origin::Template(Arc::new(template)), ..rig.start() }
}

#[tokio::test]
async fn vms_go_on_where_the_template_was_saved() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let (store, key) = made(&rig).await;
    assert!(children().is_empty());
    assert!(left(&store).is_empty(), "the maker left files");
    for _ in 0..2 {
        let vm = Vm::start(restored(&rig, &store, &key)).await.unwrap();
        let phases: Vec<Phase> = vm.phases().iter().map(|time| time.phase).collect();
        assert_eq!(phases, [Phase::Spawn, Phase::Copy, Phase::Restore, Phase::Resume, Phase::Hello]);
        assert_confined(vm.qemu_pid());
        let absent = ContainerRef { container_id: "absent".into() };
        assert_eq!(vm.agent().pids(absent).await.unwrap_err().code(), tonic::Code::NotFound);
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
        vm.stop().await.unwrap();
        assert_eq!(vm.ended().await, VmState::Stopped);
    }
    rig.assert_clean().await;
}

#[tokio::test]
async fn both_machines_can_be_templates() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let store = store(&rig.root.path().join("templates"));
    let spec = VmSpec::smallest(Machine::Pc);
    let key = make(&Maker { spec, ..maker(&rig) }, &store).await.unwrap();
    let entries = store.list().unwrap();
    assert_eq!(entries.iter().map(|entry| &entry.key).collect::<Vec<_>>(), [&key]);
    assert!(entries[0].current && entries[0].bytes > 1 << 20, "{entries:?}");
    assert_eq!(entries[0].shape.as_ref().map(|shape| (shape.machine, shape.memory_mib)), Some(("pc", 128)));
    let vm = Vm::start(VmStart { spec, ..restored(&rig, &store, &key) }).await.unwrap();
    // Those that use it do not miss it.
    assert!(store.remove(&key).unwrap());
    assert!(!store.remove(&key).unwrap());
    assert!(store.open(&key).unwrap().is_none());
    vm.stop().await.unwrap();
    rig.assert_clean().await;
}

/// Each byte that was changed or is missing is found before the guest runs.
#[tokio::test]
async fn damage_is_found_before_a_guest_runs() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let (store, key, dir) = copied(&rig).await;
    let refusal = || match store.open(&key) {
        Err(error @ TemplateError::Damaged { .. }) => error_chain(&error),
        other => panic!("{other:?}"),
    };
    let flip = |file: &str, at: u64| {
        let file = File::options().read(true).write(true).open(dir.join(file)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };

    flip("manifest", 100);
    assert!(refusal().contains("the manifest's digest differs"), "{}", refusal());
    flip("manifest", 100);
    flip("state", 1000);
    assert!(refusal().contains("state has another size or digest"), "{}", refusal());
    flip("state", 1000);

    let ram = File::options().write(true).open(dir.join("ram")).unwrap();
    let size = ram.metadata().unwrap().len();
    flip("ram", size / 2);
    let error = Vm::start(restored(&rig, &store, &key)).await.unwrap_err();
    assert!(error_chain(&error).contains("has another checksum"), "{}", error_chain(&error));
    flip("ram", size / 2);
    let cut = restored(&rig, &store, &key);
    ram.set_len(size - 1).unwrap();
    let error = error_chain(&Vm::start(cut).await.unwrap_err());
    assert!(error.starts_with("Cannot restore the VM: The template"), "{error}");
    assert!(refusal().contains("its memory has"), "{}", refusal());
    ram.set_len(size).unwrap();

    fs::remove_file(dir.join("state")).unwrap();
    assert!(matches!(store.open(&key), Err(TemplateError::Io { .. })));
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_template_under_anothers_key_is_refused() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let (store, key, dir) = copied(&rig).await;
    let other: Key = "0123456789abcdef".parse().unwrap();
    fs::rename(dir, store.path(&other)).unwrap();
    let error = store.open(&other).unwrap_err().to_string();
    assert!(error.contains(&format!("it is the template {key}")), "{error}");
    assert!(!store.list().unwrap()[0].current);
}

/// The key rules it out; if it happened, QEMU would refuse.
#[tokio::test]
async fn a_machine_of_another_shape_is_no_hang() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let (store, key) = made(&rig).await;
    let start = VmStart { spec: VmSpec::smallest(Machine::Pc), ..restored(&rig, &store, &key) };
    let begin = std::time::Instant::now();
    let error = error_chain(&Vm::start(start).await.unwrap_err());
    assert!(begin.elapsed() < Duration::from_secs(30), "{error}");
    rig.assert_clean().await;
}

/// As when its QEMU hangs: the limit is the caller's, the phase is named.
#[tokio::test]
async fn a_restore_that_takes_too_long_names_its_phase() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let (store, key) = made(&rig).await;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let boot_timeout = Duration::from_secs(2);
    // A share daemon that never says a word holds QEMU up for ever.
    let start = VmStart { share: Some(theirs.into()), boot_timeout, ..restored(&rig, &store, &key) };
    let error = error_chain(&Vm::start(start).await.unwrap_err());
    assert!(error.starts_with("Waited 2 s in vain for QEMU to restore the template"), "{error}");
    drop(ours);
    rig.assert_clean().await;
}

#[tokio::test]
async fn one_maker_at_a_time_and_a_dead_one_leaves_nothing_that_matters() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let store = store(&rig.root.path().join("templates"));
    let maker = Maker { spec: VmSpec::smallest(Machine::Q35), ..maker(&rig) };
    let first = tokio::spawn({
        let (maker, store) = (maker.clone(), store.clone());
        async move { make(&maker, &store).await }
    });
    let key = Key::of(&maker.spec, &maker.assets, &maker.qemu, maker.accelerator).unwrap();
    timeout(Duration::from_secs(20), async {
        while children().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    assert!(store.is_being_made(&key));
    assert!(matches!(make(&maker, &store).await, Err(TemplateError::Busy(busy)) if busy == key));
    let hurried = Maker { boot_timeout: Duration::ZERO, ..maker.clone() };
    let waits = tokio::time::timeout(Duration::from_secs(1), make_or_wait(&hurried, &store));
    assert!(waits.await.is_err(), "it does not wait for the other one");

    // Killed in the middle: the lock is free, the half-made template has no name.
    first.abort();
    let _ = first.await;
    assert!(!store.is_being_made(&key));
    assert!(store.open(&key).unwrap().is_none());
    assert!(store.list().unwrap().is_empty());
    assert!(rig.root.path().join("templates").join(format!("{key}.new")).exists());

    // The next one clears up, whatever stands in the lock file.
    fs::write(rig.root.path().join("templates").join(format!("{key}.lock")), "4711").unwrap();
    make(&maker, &store).await.unwrap();
    assert!(store.open(&key).unwrap().is_some());
    assert!(!rig.root.path().join("templates").join(format!("{key}.new")).exists());
    assert!(children().is_empty());
    assert!(left(&store).is_empty());
}

#[tokio::test]
async fn a_full_disk_is_named_and_nothing_half_written_stays() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let rig = Rig::new();
    let small = rig.root.path().join("small");
    fs::create_dir(&small).unwrap();
    mount("tmpfs", &small, "tmpfs", MountFlags::empty(), Some(c"size=4m")).unwrap();
    let store = store(&small);
    let maker = Maker { spec: VmSpec::smallest(Machine::Q35), ..maker(&rig) };
    let failed = make(&maker, &store).await;
    let left: Vec<_> = fs::read_dir(&small).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    unmount(&small, UnmountFlags::empty()).unwrap();
    let error = error_chain(&failed.unwrap_err());
    assert!(error.contains("Cannot write") && error.contains("No space left on device"), "{error}");
    assert!(left.iter().all(|name| name == "run" || name.to_str().unwrap().ends_with(".lock")), "{left:?}");
}

#[tokio::test]
async fn a_template_of_another_qemu_is_not_found() {
    let rig = Rig::new();
    let maker = maker(&rig);
    let other = rig.root.path().join("qemu-system-x86_64");
    common::copy_program(maker.qemu.path(), &other);
    let other = Qemu::at(&other).unwrap();
    assert_eq!(other.version(), maker.qemu.version());
    let key = |qemu: &Qemu| Key::of(&maker.spec, &maker.assets, qemu, maker.accelerator).unwrap();
    assert_ne!(key(&other), key(&maker.qemu));
}
