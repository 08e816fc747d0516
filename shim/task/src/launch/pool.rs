//! The pool as `start` sees it: a server that is there already, or none. Whatever goes wrong with the pool, a
//! server is spawned as ever.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vmctr_vmm::config::Config;
use vmctr_vmm::pool::wire::{check_peer, receive, send};
use vmctr_vmm::pool::{Answer, Ask, Order, config_digest, socket};
use vmctr_vmm::spec::{Host, Limits, StartMode, VmSpec};

use crate::oci::OciSpec;

/// A pool that takes longer is of no use.
const PATIENCE: Duration = Duration::from_secs(2);

/// Gives a waiting server this order; the bundle is the working directory, `words` the pipe that the server says
/// things to. `false`: there is none.
pub fn take(config: &Config, order: Order, words: BorrowedFd<'_>) -> Result<bool> {
    let pool = match UnixStream::connect(socket(config)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(false);
        }
        pool => pool.context("connect to the pool")?,
    };
    check_peer(&pool).context("trust the pool")?;
    pool.set_read_timeout(Some(PATIENCE))?;
    pool.set_write_timeout(Some(PATIENCE))?;
    let bundle = File::open(".").context("open the bundle")?;
    send(&pool, &Ask::Take(order), &[bundle.as_fd(), words]).context("ask the pool")?;
    match receive::<Answer>(&pool).context("wait for the pool's answer")? {
        Some((Answer::Taken(_), _)) => Ok(true),
        Some((Answer::Empty, _)) => Ok(false),
        Some((Answer::Refused(why), _)) => bail!("the pool refuses: {why}"),
        Some((Answer::List(_), _)) | None => bail!("the pool gives no answer"),
    }
}

/// Whether the container in this bundle wants a VM of the kind that waits. A bundle that cannot be read wants
/// nothing: its create request will say why.
pub fn wanted(config: &Config, bundle: &Path) -> bool {
    let looked = || {
        let spec = OciSpec::load(bundle).ok()?;
        let annotations = spec.annotations();
        let start = StartMode::resolve(config.vm.start, &annotations).ok()?;
        let host = Host::detect();
        let vm = VmSpec::resolve(&config.vm, &spec.limits(), &annotations, &host).ok()?;
        let none = std::collections::HashMap::<String, String>::new();
        let waiting = VmSpec::resolve(&config.vm, &Limits::default(), &none, &host).ok()?;
        Some(start == StartMode::Pool && vm == waiting)
    };
    looked().unwrap_or(false)
}

/// What the server is told.
pub fn order(config: &Config, opts: &containerd_shim::StartOpts, socket: &str) -> Order {
    Order {
        config: config_digest(config),
        namespace: opts.namespace.clone(),
        id: opts.id.clone(),
        address: opts.address.clone(),
        socket: socket.to_owned(),
        ttrpc_address: opts.ttrpc_address.clone(),
        debug: opts.debug,
    }
}
