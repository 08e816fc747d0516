//! A container whose root is to be mounted: found and checked, and how its VM is reached.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use serde::{Deserialize, Serialize};
use vmctr_fileshare::export::wire::stream::Stream;
use vmctr_proto::ports;
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::{self, Entry};

use super::check;
use super::order::Version;
use crate::cli::MountArgs;
use crate::commands::Context;
use crate::container;
use crate::control;
use crate::failure::Failure;

/// How long the VM may take to accept a stream.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// `OK `, a port and a line end are shorter.
const LONGEST_ANSWER: usize = 32;

/// A container, and where its root goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Of what `mount.json` says of a container.
    version: Version<1>,
    /// Where it is mounted: absolute, without symbolic links.
    pub mountpoint: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's ID.
    pub container: String,
    /// Whether nothing can be changed through the mount.
    pub read_only: bool,
    /// Where its shim listens.
    control: PathBuf,
    /// Where its VM's vsock is.
    vsock: PathBuf,
}

/// The guest is not reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody serves the VM's vsock any more, or not in time.
    #[error("The container's VM is not reached at {}", .0.display())]
    Socket(PathBuf, #[source] io::Error),
    /// Nobody listens in the guest.
    #[error("The container's guest takes no streams for exports")]
    Refused,
}

impl Target {
    /// Finds the container and checks the folder.
    pub async fn check(context: &Context, config: &Config, args: &MountArgs) -> Result<Self, Failure> {
        check::check_host()?;
        let mountpoint = check::check_mountpoint(&args.dir)?;
        let client = context.containerd().await?;
        container::check(context, &client, &args.container).await?;
        let entry = entry(context, config, &args.container)?;
        Ok(Self {
            version: Version,
            mountpoint,
            namespace: context.namespace.clone(),
            container: args.container.clone(),
            read_only: args.ro,
            control: entry.control_socket(),
            vsock: entry.vsock_socket(),
        })
    }

    /// Has the guest serve the container's root; the number that streams name.
    pub async fn export(&self) -> Result<u32, control::Error> {
        control::export(&self.control).await
    }

    /// A stream to the guest's exports. Blocks.
    pub fn dial(&self) -> Result<Stream, DialError> {
        let failed = |error| DialError::Socket(self.vsock.clone(), error);
        let mut stream = UnixStream::connect(&self.vsock).map_err(failed)?;
        stream.set_read_timeout(Some(DIAL_LIMIT)).map_err(failed)?;
        stream.set_write_timeout(Some(DIAL_LIMIT)).map_err(failed)?;
        stream.write_all(format!("CONNECT {}\n", ports::EXPORT).as_bytes()).map_err(failed)?;
        match first_line(&mut stream).map_err(failed)? {
            Some(answer) if answer.starts_with(b"OK ") => Ok(Stream::from(OwnedFd::from(stream))),
            _ => Err(DialError::Refused),
        }
    }
}

/// The run directory of the container's VM.
fn entry(context: &Context, config: &Config, id: &str) -> Result<Entry, Failure> {
    let namespace = &context.namespace;
    find_live(run_dir::list(&config.run_dir)?, namespace, id).ok_or_else(|| {
        Failure::failed(anyhow!("Container {id} does not run"))
            .hint(format!("`ctr -n {namespace} task start {id}` starts it"))
    })
}

/// Another bundle of the container's, whose shim was killed, may have left a directory.
fn find_live(entries: Vec<Entry>, namespace: &str, id: &str) -> Option<Entry> {
    entries.into_iter().find(|Entry { meta, .. }| {
        meta.owner.namespace == namespace && meta.owner.container_id == id && meta.live_shim().is_some()
    })
}

/// A line, byte by byte so that nothing after it is taken; none when the stream ends before.
fn first_line(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while line.len() < LONGEST_ANSWER && stream.read(&mut byte)? == 1 {
        if byte[0] == b'\n' {
            return Ok(Some(line));
        }
        line.push(byte[0]);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread;

    use vmctr_vmm::run_dir::{Owner, Role, RunDir};

    use super::*;

    fn target(vsock: &Path) -> Target {
        Target {
            version: Version,
            mountpoint: "/mnt".into(),
            namespace: "default".into(),
            container: "web".into(),
            read_only: false,
            control: "/none".into(),
            vsock: vsock.to_owned(),
        }
    }

    fn dialled(answer: &'static [u8]) -> Result<Stream, DialError> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let serve = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert_eq!(first_line(&mut stream).unwrap().unwrap(), b"CONNECT 1027");
            stream.write_all(answer).unwrap();
        });
        let dialled = target(&socket).dial();
        serve.join().unwrap();
        dialled
    }

    #[test]
    fn what_a_dead_shim_left_does_not_hide_the_live_one() {
        let root = tempfile::tempdir().unwrap();
        let owner = |bundle: &str| Owner {
            namespace: "default".into(),
            container_id: "web".into(),
            bundle: bundle.into(),
        };
        let bundles = ["/a", "/b"];
        let dirs = bundles.map(|bundle| RunDir::create(root.path(), owner(bundle)).unwrap());
        for (dead, live) in [(0, 1), (1, 0)] {
            dirs[dead].disown().unwrap();
            let found = find_live(run_dir::list(root.path()).unwrap(), "default", "web").unwrap();
            assert_eq!(found.path, dirs[live].path());
            dirs[dead].record(Role::Shim, std::process::id()).unwrap();
        }
    }

    #[test]
    fn what_follows_the_answer_is_the_streams() {
        let stream = dialled(b"OK 4294967295\nhello").unwrap();
        let mut rest = [0; 5];
        stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn whoever_does_not_agree_is_no_guest() {
        for answer in [&b""[..], b"OK", b"NO 1\n", b"OK 00000000000000000000000000000000000000\n"] {
            assert!(matches!(dialled(answer), Err(DialError::Refused)), "{answer:?}");
        }
        let gone = target(Path::new("/nonexistent/vsock.sock")).dial();
        assert!(matches!(gone, Err(DialError::Socket(..))));
    }
}
