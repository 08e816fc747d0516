//! Making a template: boots a VM without the devices that come later, saves it where its agent waits for them,
//! and puts what was saved under its key.
//!
//! ```text
//!   lock ── boot ── "waits for its devices" ── free memory reported ── stop ── save ── QEMU killed
//!     └── KEY.new: ram packed, state, manifest; all synced ── a VM restored from it answers ── renamed to KEY
//!                                                                          others pruned ── unlock
//! ```
//!
//! Nobody ever finds a template that no VM was restored from.
//!
//! A maker that is killed leaves KEY.new and its run directory, which the next one removes; its QEMU dies with
//! it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use vmctr_proto::TEMPLATE_POINT;

use super::manifest::{Manifest, State, sha256};
use super::store::{MANIFEST, RAM, STATE, Store, Template, sync_dir};
use super::{Key, TemplateError, ram};
use crate::accel::Accelerator;
use crate::assets::GuestAssets;
use crate::config::JailConfig;
use crate::qemu::Qemu;
use crate::qemu::command::STATE_URI;
use crate::run_dir::{Owner, Role, RunDir};
use crate::spec::VmSpec;
use crate::vm::{Attempt, Job, Launch, Origin, Phase, Vm, VmError, VmStart, VmState, boot_files};

/// How long the guest goes on before it is stopped: in this time its kernel reports the memory that it has
/// freed since the boot, which is then not part of the template.
const SETTLE: Duration = Duration::from_secs(5);

/// How long a maker may take for all but the VMs' starts.
const WRITING: Duration = Duration::from_secs(60);

/// How often one looks whether another maker is done.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What [`make`] needs.
#[derive(Clone, Debug)]
pub struct Maker {
    /// The machine.
    pub spec: VmSpec,
    /// Its kernel and initramfs.
    pub assets: GuestAssets,
    /// The program that runs it.
    pub qemu: Qemu,
    /// What runs the guest.
    pub accelerator: Accelerator,
    /// How QEMU is confined.
    pub jail: JailConfig,
    /// From QEMU's start until the agent waits.
    pub boot_timeout: Duration,
}

/// Makes the template, unless it is there and whole.
///
/// # Errors
/// Another process makes it, the VM does not come up, or there is no room. No part of it is left then.
pub async fn make(maker: &Maker, store: &Store) -> Result<Key, TemplateError> {
    let key = Key::of(&maker.spec, &maker.assets, &maker.qemu, maker.accelerator)
        .map_err(TemplateError::io("look at", maker.qemu.path()))?;
    let lock = store.lock(&key)?;
    if matches!(store.open(&key), Ok(Some(_))) {
        return Ok(key);
    }
    let fresh = store.fresh(&key, &lock)?;
    let made = make_in(maker, store, &key, &fresh).await;
    let published = made.and_then(|()| store.publish(&key, &fresh, &lock));
    if let Err(error) = published {
        super::store::remove_tree(&fresh)?;
        return Err(error);
    }
    drop(lock);
    store.prune(&key)?;
    Ok(key)
}

/// As [`make`], but waits while another process makes it.
///
/// # Errors
/// As for [`make`]; that another process makes it only if it takes longer than one should.
pub async fn make_or_wait(maker: &Maker, store: &Store) -> Result<Key, TemplateError> {
    // It boots one VM and restores another.
    let deadline = Instant::now() + 2 * maker.boot_timeout + WRITING;
    loop {
        match make(maker, store).await {
            Err(TemplateError::Busy(_)) if Instant::now() < deadline => sleep(LOOK_AGAIN).await,
            done => return done,
        }
    }
}

async fn make_in(maker: &Maker, store: &Store, key: &Key, fresh: &Path) -> Result<(), TemplateError> {
    let owner = Owner {
        namespace: "vmctr".to_owned(),
        container_id: format!("template-{key}"),
        bundle: store.path(key),
    };
    let run_dir = RunDir::create(&store.run_dir(), owner)?;
    let made = save_and_prove(maker, &run_dir, key, fresh).await;
    run_dir.remove()?;
    made
}

async fn save_and_prove(
    maker: &Maker,
    run_dir: &RunDir,
    key: &Key,
    fresh: &Path,
) -> Result<(), TemplateError> {
    let memory = boot_and_save(maker, run_dir, fresh).await?;
    let (writer, name, path) = (maker.clone(), key.clone(), fresh.to_owned());
    let written = spawn_blocking(move || {
        write(&writer, name.clone(), &memory, &path)?;
        Template::open(&path, &name)
    });
    let template = written.await.map_err(|error| TemplateError::Thread(error.into()))??;
    prove(maker, run_dir, template).await.map_err(|error| TemplateError::Proof(error.into()))
}

/// Restores a VM, which must answer, and ends it.
async fn prove(maker: &Maker, run_dir: &RunDir, template: Template) -> Result<(), VmError> {
    let start = VmStart {
        spec: maker.spec,
        origin: Origin::Template(template.into()),
        qemu: maker.qemu.clone(),
        accelerator: maker.accelerator,
        run_dir: run_dir.clone(),
        jail: maker.jail.clone(),
        share: None,
        share_later: false,
        boot_timeout: maker.boot_timeout,
    };
    Vm::start(start).await?.stop().await
}

/// Returns the guest's memory.
async fn boot_and_save(maker: &Maker, run_dir: &RunDir, fresh: &Path) -> Result<File, TemplateError> {
    let begin = Instant::now();
    let (files, memory) = boot_files(&maker.assets, &maker.spec, true).await?;
    let memory = memory.ok_or_else(|| TemplateError::damaged(fresh, "it has no memory"))?;
    let state_path = fresh.join(STATE);
    // QEMU takes a descriptor for writing only as just that.
    let state = File::options().write(true).create_new(true).open(&state_path);
    let state = state.map_err(TemplateError::io("create", &state_path))?;
    let launch = Launch {
        spec: &maker.spec,
        qemu: &maker.qemu,
        accelerator: maker.accelerator,
        jail: &maker.jail,
        files: &files,
        job: Job::Save(state),
        vsock: None,
        share: None,
    };
    let launched = launch.start().await?;
    let pid = launched.pid;
    let (_state, starting) = watch::channel(VmState::Starting);
    let (mut attempt, qmp) = Attempt::new(launched, begin, maker.boot_timeout + SETTLE, starting);
    let saved = async {
        run_dir.record(Role::Qemu, pid)?;
        attempt.spawned(qmp).await?;
        attempt.says(Phase::Boot, TEMPLATE_POINT).await?;
        sleep(SETTLE).await;
        let save = async |qmp: &mut crate::qmp::Qmp| {
            qmp.stop().await?;
            Ok(qmp.save(STATE_URI).await?)
        };
        Ok(attempt.control(Phase::Save, save).await?)
    };
    let saved: Result<(), TemplateError> = saved.await;
    attempt.kill().await?;
    saved.map(|()| memory)
}

fn write(maker: &Maker, key: Key, memory: &File, fresh: &Path) -> Result<(), TemplateError> {
    let state_path = fresh.join(STATE);
    let state = fs::read(&state_path).map_err(TemplateError::io("read", &state_path))?;
    sync(&state_path)?;
    let ram_path = fresh.join(RAM);
    let written = File::create_new(&ram_path).and_then(|file| {
        let layout = ram::pack(memory, &file)?;
        file.sync_all().map(|()| layout)
    });
    let layout = written.map_err(TemplateError::io("write", &ram_path))?;
    let state = State { size: state.len() as u64, sha256: sha256(&state) };
    let version = maker.qemu.version().to_string();
    let manifest = Manifest::new(key, &maker.spec, maker.accelerator, version, state, layout);
    write_manifest(&fresh.join(MANIFEST), &manifest)?;
    sync_dir(fresh)
}

fn write_manifest(path: &Path, manifest: &Manifest) -> Result<(), TemplateError> {
    let written = manifest.encode().map_err(std::io::Error::from).and_then(|bytes| {
        let mut file = File::create_new(path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    });
    written.map_err(TemplateError::io("write", path))
}

fn sync(path: &Path) -> Result<(), TemplateError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(TemplateError::io("sync", path))
}
