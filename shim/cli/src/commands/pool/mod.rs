//! `vmctr pool`: VMs that wait for containers.
//!
//! ```text
//!   run   keeper     one thread per place: starts a member, waits for its end, starts the next
//!         members    who is there: the table that keepers and clients share
//!         serve      pool.sock: shims that want a VM, `vmctr pool ls`
//!   ls    asks the running pool
//! ```

mod keeper;
mod members;
mod serve;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use vmctr_vmm::config::Config;
use vmctr_vmm::error_chain;
use vmctr_vmm::pool::wire::{check_peer, receive, send};
use vmctr_vmm::pool::{Answer, Ask, Member, size, socket};
use vmctr_vmm::run_dir::{self, RunDirError};

use super::Context;
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;
use crate::sys::keep_descriptors;
use members::Members;

/// A pool answers at once, but may have some clients to serve before.
const PATIENCE: Duration = Duration::from_secs(10);

/// Keeps the pool until a signal ends the process.
pub fn run(config: &Config) -> Outcome {
    let places = places(config)?;
    keep_descriptors();
    let _lock = only_one(config)?;
    clear_up(config);
    let members = Arc::new(Members::default());
    let listener = serve::listen(&socket(config))?;
    for place in 0..places {
        let members = Arc::clone(&members);
        thread::Builder::new().name(format!("place-{place}")).spawn(move || keeper::keep(&members))?;
    }
    serve::serve(&listener, &members, config)?;
    Ok(Verdict::Good)
}

/// How many VMs are to wait: at least one.
fn places(config: &Config) -> Result<usize, Failure> {
    let (wanted, places) = (config.pool.size, size(config));
    if wanted == 0 {
        let error = anyhow!("The configuration wants no waiting VMs: pool.size is 0");
        return Err(Failure::failed(error).hint("set it, such as `[pool]` and `size = 2`"));
    }
    let (all, each) = (config.pool.memory, config.vm.memory);
    if places == 0 {
        let error = anyhow!("No VM may wait: pool.memory is {all}, and vm.memory, which each has, {each}");
        return Err(Failure::failed(error).hint("raise pool.memory"));
    }
    if u32::try_from(places).is_ok_and(|places| places < wanted) {
        eprintln!("vmctr: {places} instead of {wanted} VMs wait: pool.memory is {all}, and each has {each}");
    }
    Ok(places)
}

/// Prints who waits.
pub fn list(context: &Context, config: &Config) -> Outcome {
    let list = ask_list(config)?;
    if context.json {
        output::json(&list)?;
    } else {
        let row = |member: &Member| {
            let qemu = member.qemu.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
            let state = if member.qemu.is_some() { "waits" } else { "starts" };
            vec![member.pid.to_string(), qemu, output::duration(member.age_seconds), state.to_owned()]
        };
        output::print_line(&output::table(&["PID", "QEMU", "AGE", "STATE"], list.iter().map(row)))?;
    }
    Ok(Verdict::Good)
}

fn ask_list(config: &Config) -> Result<Vec<Member>, Failure> {
    let path = socket(config);
    let pool = match UnixStream::connect(&path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            let error = anyhow!("No pool runs: nobody listens on {}", path.display());
            return Err(Failure::not_found(error).hint("`vmctr pool run` keeps one"));
        }
        pool => pool.with_context(|| format!("Cannot connect to {}", path.display()))?,
    };
    check_peer(&pool)?;
    pool.set_read_timeout(Some(PATIENCE))?;
    send(&pool, &Ask::List, &[])?;
    match receive(&pool).context("The pool does not answer: restart `vmctr pool run`")? {
        Some((Answer::List(list), _)) => Ok(list),
        other => Err(anyhow!("The pool answers {other:?}").into()),
    }
}

/// The lock is free again however its holder ends.
fn only_one(config: &Config) -> anyhow::Result<File> {
    let path = config.run_dir.join("pool.lock");
    run_dir::make_dir(&config.run_dir)
        .with_context(|| format!("Cannot create {}", config.run_dir.display()))?;
    run_dir::lock(&path, Duration::ZERO).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => anyhow!(error).context("Another pool runs"),
        _ => anyhow!(error).context(format!("Cannot lock {}", path.display())),
    })
}

/// Members that were killed together with their pool left their run directories.
fn clear_up(config: &Config) {
    for entry in run_dir::list(&config.run_dir).unwrap_or_default() {
        let owner = &entry.meta.owner;
        let member = owner.namespace == "vmctr" && owner.container_id.starts_with("pool-");
        if !member {
            continue;
        }
        match run_dir::clear_dead(&config.run_dir, &entry.key) {
            Ok(()) | Err(RunDirError::InUse { .. }) => {}
            Err(error) => eprintln!("vmctr: {}", error_chain(&error)),
        }
    }
}
