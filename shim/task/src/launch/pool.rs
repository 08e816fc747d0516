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
/// things to. `false`: there is none. A pool that does not answer may have passed the order on; whether it has shows
/// at the pipe and at the server's socket.
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
    match receive::<Answer>(&pool) {
        Ok(Some((Answer::Taken(_), _)) | None) => Ok(true),
        Ok(Some((Answer::Empty, _))) => Ok(false),
        Ok(Some((Answer::Refused(why), _))) => bail!("the pool refuses: {why}"),
        Ok(Some((Answer::List(_), _))) => bail!("the pool answers something else"),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionReset) => {
            Ok(true)
        }
        Err(error) => Err(error).context("wait for the pool's answer"),
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What comes of a request to a pool that does this with it.
    fn asked(pool: impl FnOnce(UnixStream) + Send + 'static) -> Result<bool> {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { run_dir: dir.path().to_owned(), ..Config::default() };
        let listener = UnixListener::bind(socket(&config)).unwrap();
        let served = std::thread::spawn(move || pool(listener.accept().unwrap().0));
        let (_words, pipe) = io::pipe().unwrap();
        let taken = take(&config, order(&config, &containerd_shim::StartOpts::default(), ""), pipe.as_fd());
        served.join().unwrap();
        taken
    }

    #[test]
    fn a_pool_that_ends_may_have_passed_the_order_on() {
        assert!(asked(|pool| drop(receive::<Ask>(&pool))).is_ok_and(|taken| taken));
    }

    #[test]
    fn a_pool_that_has_nothing_or_refuses_has_not() {
        let answer = |answer: Answer| {
            asked(move |pool| {
                receive::<Ask>(&pool).unwrap();
                send(&pool, &answer, &[]).unwrap();
            })
        };
        assert!(!answer(Answer::Empty).unwrap());
        assert!(answer(Answer::Refused("why".into())).unwrap_err().to_string().contains("refuses: why"));
    }
}
