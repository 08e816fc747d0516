//! `start`: spawns the server, waits until it serves, tells containerd where.
//!
//! containerd 2.3 and later sends `BootstrapParams` on standard input and reads a `BootstrapResult`; earlier ones
//! send arguments and environment and read a bare address, which means task API v2 to all of them.

use std::env;
use std::fs;
use std::io::{IsTerminal, PipeReader, Read, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use containerd_shim::protos::TASK_API_VERSION;
use containerd_shim::protos::protobuf::Message;
use containerd_shim::{Flags, StartOpts};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::warn;
use vmctr_vmm::config::Config;

use super::{TTRPC_ADDRESS, address_file, pool, socket_path};
use crate::log;

/// Far above any message of containerd's.
const MAX_INPUT: u64 = 10 << 20;

/// From a server's order or start until it serves; both take milliseconds.
const WAITING_LIMIT: Duration = Duration::from_secs(3);
const SPAWNED_LIMIT: Duration = Duration::from_secs(60);

/// How containerd asked.
struct Asked {
    opts: StartOpts,
    /// By `BootstrapParams`, so the answer is a `BootstrapResult`.
    bootstrap: bool,
}

/// Does it all; the working directory is the bundle.
pub fn run(flags: &Flags) -> Result<()> {
    // The user learns of a bad configuration here; the server's words come later and elsewhere.
    let config = Config::load()?;
    let asked = asked(flags, &read_stdin()?)?;
    let address = asked.opts.socket_address(&asked.opts.id);
    if !take_waiting(&config, &asked.opts, &address) {
        spawn_server(&asked.opts, &address)?;
    }
    fs::write(address_file(Path::new(".")), &address).context("write the address file")?;
    let answer = if asked.bootstrap { bootstrap_result(&address)? } else { address.into_bytes() };
    stdout().write_all(&answer).context("write the address")
}

fn read_stdin() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    if !stdin().is_terminal() {
        stdin().take(MAX_INPUT).read_to_end(&mut input).context("read standard input")?;
    }
    Ok(input)
}

fn asked(flags: &Flags, input: &[u8]) -> Result<Asked> {
    ensure!(!flags.id.is_empty(), "no container: -id is missing");
    ensure!(!flags.namespace.is_empty(), "no namespace: -namespace is missing");
    // Runtime options of an earlier containerd parse as parameters, too, but do not name this container.
    let params = BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == flags.id && params.namespace == flags.namespace);
    let bootstrap = params.is_some();
    let opts = params.map_or_else(|| legacy(flags), StartOpts::from);
    let opts = StartOpts { debug: opts.debug || flags.debug, ..opts };
    ensure!(!opts.ttrpc_address.is_empty(), "no ttrpc address: {TTRPC_ADDRESS} is not set");
    Ok(Asked { opts, bootstrap })
}

fn legacy(flags: &Flags) -> StartOpts {
    StartOpts {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        address: flags.address.clone(),
        publish_binary: flags.publish_binary.clone(),
        ttrpc_address: env::var(TTRPC_ADDRESS).unwrap_or_default(),
        debug: flags.debug,
        ..StartOpts::default()
    }
}

fn bootstrap_result(address: &str) -> Result<Vec<u8>> {
    let result = BootstrapResult {
        version: TASK_API_VERSION,
        address: address.to_owned(),
        protocol: "ttrpc".to_owned(),
        ..BootstrapResult::default()
    };
    result.write_to_bytes().context("encode the address")
}

/// Whether a server that waited in the pool serves now. What is wrong with it or the pool is told to containerd's
/// log and does no harm.
fn take_waiting(config: &Config, opts: &StartOpts, address: &str) -> bool {
    let taken = || -> Result<bool> {
        if !pool::wanted(config, Path::new(".")) {
            return Ok(false);
        }
        let (words, pipe) = std::io::pipe().context("make a pipe")?;
        if !pool::take(config, pool::order(config, opts, address), pipe.as_fd())? {
            return Ok(false);
        }
        drop(pipe);
        let said = hear(&words, WAITING_LIMIT);
        // From here on, whoever gets the order late declines it.
        drop(words);
        // One that died has said nothing, either; and one that says nothing in time may serve all the same.
        let serves = UnixStream::connect(socket_path(address));
        match said {
            Ok(text) if text.is_empty() => serves.map(drop).context("the waiting server is gone")?,
            Ok(text) => bail!("{}", text.trim()),
            Err(error) if serves.is_err() => return Err(error).context("wait for the waiting server"),
            Err(_) => {}
        }
        Ok(true)
    };
    taken().unwrap_or_else(|error| {
        // containerd takes standard error for a part of the address.
        let _ = log::start(config.log.level.as_str(), &opts.id, &opts.namespace);
        warn!("No VM from the pool: {error:#}");
        false
    })
}

/// All that is said until the last writer is gone.
fn hear(mut words: &PipeReader, limit: Duration) -> Result<String> {
    let deadline = Instant::now() + limit;
    let (mut text, mut piece) = (vec![], [0; 4096]);
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
        let readable = poll(&mut [PollFd::new(&words, PollFlags::IN)], Some(&left))?;
        ensure!(readable > 0, "it neither serves nor ends within {} s", limit.as_secs());
        match words.read(&mut piece)? {
            0 => return Ok(String::from_utf8_lossy(&text).into_owned()),
            length => text.extend_from_slice(&piece[..length]),
        }
    }
}

/// The server says nothing when it serves and why when it does not; then it closes the pipe.
fn spawn_server(opts: &StartOpts, address: &str) -> Result<()> {
    let program = env::current_exe().context("find this program")?;
    let (words, pipe) = std::io::pipe().context("make a pipe")?;
    let mut command = Command::new(program);
    command.args(["-namespace", &opts.namespace, "-id", &opts.id, "-address", &opts.address]);
    command.args(["-socket", address]);
    if opts.debug {
        command.arg("-debug");
    }
    command.env(TTRPC_ADDRESS, &opts.ttrpc_address);
    // A group of its own: signals that a terminal sends to containerd do not reach it.
    command.process_group(0).stdin(Stdio::null());
    command.stdout(pipe.try_clone().context("share the pipe")?).stderr(pipe);
    let mut child = command.spawn().context("start the shim's server")?;
    drop(command);
    let said = hear(&words, SPAWNED_LIMIT);
    if matches!(&said, Ok(text) if text.is_empty()) {
        return Ok(());
    }
    let _ = child.kill();
    let _ = child.wait();
    bail!("the shim's server does not start: {}", said.context("wait for it")?.trim())
}

#[cfg(test)]
mod tests {
    use std::thread::{sleep, spawn};

    use super::*;

    #[test]
    fn a_server_is_heard_to_its_end_but_not_for_ever() {
        let (words, mut pipe) = std::io::pipe().unwrap();
        pipe.write_all(b"first ").unwrap();
        let error = hear(&words, Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("neither serves nor ends"), "{error}");
        let server = spawn(move || {
            sleep(Duration::from_millis(50));
            pipe.write_all(b"last").unwrap();
        });
        assert_eq!(hear(&words, SPAWNED_LIMIT).unwrap(), "last");
        server.join().unwrap();
        assert_eq!(hear(&words, Duration::ZERO).unwrap(), "");
    }

    fn flags() -> Flags {
        Flags { id: "c1".into(), namespace: "ns".into(), address: "/c.sock".into(), ..Flags::default() }
    }

    #[test]
    fn parameters_for_this_container_are_taken_and_answered_in_kind() {
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "ns".into(),
            containerd_ttrpc_address: "/c.ttrpc".into(),
            containerd_grpc_address: "/grpc".into(),
            ..BootstrapParams::default()
        };
        let asked = asked(&flags(), &params.write_to_bytes().unwrap()).unwrap();
        assert!(asked.bootstrap);
        assert_eq!((asked.opts.ttrpc_address.as_str(), asked.opts.address.as_str()), ("/c.ttrpc", "/grpc"));
        let result = BootstrapResult::parse_from_bytes(&bootstrap_result("unix:///x").unwrap()).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///x"));
    }

    #[test]
    fn runtime_options_are_not_mistaken_for_parameters() {
        // Field 1 of both messages is a string: the type URL here, the container there.
        let options = containerd_shim::protos::protobuf::well_known_types::any::Any {
            type_url: "containerd.runc.v1.Options".into(),
            ..Default::default()
        };
        let input = options.write_to_bytes().unwrap();
        let error = asked(&flags(), &input).err().map(|error| error.to_string());
        // Arguments are used, and the environment of this test has no address.
        assert_eq!(error.is_none(), env::var(TTRPC_ADDRESS).is_ok(), "{error:?}");
    }

    #[test]
    fn a_container_must_be_named() {
        assert!(asked(&Flags::default(), b"").is_err());
    }
}
