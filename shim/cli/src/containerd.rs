//! containerd as the CLI sees it: reachable or not, its version, and which shims it can start.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::Client;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;

/// File name under which containerd looks for the runtime `io.containerd.vmctr.v2`.
pub const SHIM: &str = "containerd-shim-vmctr-v2";

/// How long containerd may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// containerd does not answer, or the process behind the socket cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot reach containerd at {address}")]
    Connect {
        address: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("containerd at {address} does not speak gRPC")]
    Channel {
        address: PathBuf,
        #[source]
        source: containerd_client::tonic::transport::Error,
    },
    #[error("containerd at {address} did not tell its version: {message}")]
    Version { address: PathBuf, message: String },
    #[error("containerd at {address} did not answer within {} s", PATIENCE.as_secs())]
    Silent { address: PathBuf },
    #[error("Cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The socket's path: `unix://` before it is accepted, as in containerd's own configuration.
pub fn socket_path(address: &str) -> PathBuf {
    PathBuf::from(address.strip_prefix("unix://").unwrap_or(address))
}

/// containerd's version, asked over gRPC.
pub async fn version(address: &Path) -> Result<String, Error> {
    let silent = |_| Error::Silent { address: address.to_owned() };
    tokio::time::timeout(PATIENCE, ask_version(address)).await.map_err(silent)?
}

/// A connection.
pub async fn connect(address: &Path) -> Result<Client, Error> {
    probe(address)?;
    Client::from_path(address).await.map_err(|source| Error::Channel { address: address.to_owned(), source })
}

async fn ask_version(address: &Path) -> Result<String, Error> {
    let client = connect(address).await?;
    let reply = client.version().version(()).await.map_err(|status| Error::Version {
        address: address.to_owned(),
        message: status.message().to_owned(),
    })?;
    Ok(reply.into_inner().version)
}

/// A plain connect first: its error says why in the system's own words, which gRPC's does not.
fn probe(address: &Path) -> Result<UnixStream, Error> {
    UnixStream::connect(address).map_err(|source| Error::Connect { address: address.to_owned(), source })
}

/// The process that listens on the socket.
pub fn server_pid(address: &Path) -> Result<Pid, Error> {
    let peer = getsockopt(&probe(address)?, PeerCredentials)
        .map_err(|errno| Error::Connect { address: address.to_owned(), source: errno.into() })?;
    Ok(Pid::from_raw(peer.pid()))
}

/// Where a containerd process finds a shim: beside its own executable or in its `PATH`, both as it sees them.
pub fn find_shim(pid: Pid, name: &str) -> Result<Option<PathBuf>, Error> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let environ = process.join("environ");
    let environ = fs::read(&environ).map_err(|source| Error::Read { path: environ, source })?;
    let beside = fs::read_link(process.join("exe")).ok().and_then(|exe| exe.parent().map(Path::to_owned));
    let folders = beside.into_iter().chain(search_path(&environ));
    let root = process.join("root");
    Ok(folders.map(|folder| folder.join(name)).find(|file| is_executable(&beneath(&root, file))))
}

/// The folders of `PATH` in a process's environment block.
fn search_path(environ: &[u8]) -> Vec<PathBuf> {
    let path = environ.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"PATH="));
    let path: OsString = path.map(OsStr::from_bytes).unwrap_or_default().to_owned();
    env::split_paths(&path).filter(|folder| folder.is_absolute()).collect()
}

fn beneath(root: &Path, file: &Path) -> PathBuf {
    root.join(file.strip_prefix("/").unwrap_or(file))
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_carry_its_scheme() {
        assert_eq!(socket_path("unix:///run/c.sock"), Path::new("/run/c.sock"));
        assert_eq!(socket_path("/run/c.sock"), Path::new("/run/c.sock"));
    }

    #[test]
    fn path_is_found_among_other_variables() {
        let folders = search_path(b"MYPATH=/no\0PATH=/a:relative:/b\0HOME=/h\0");
        assert_eq!(folders, [Path::new("/a"), Path::new("/b")]);
        assert!(search_path(b"HOME=/h\0").is_empty());
    }

    #[test]
    fn a_shim_beside_the_server_is_found_and_a_missing_one_is_not() {
        let me = std::env::current_exe().unwrap();
        let name = me.file_name().unwrap().to_str().unwrap();
        assert_eq!(find_shim(Pid::this(), name).unwrap(), Some(me.canonicalize().unwrap()));
        assert_eq!(find_shim(Pid::this(), "no-such-shim").unwrap(), None);
    }

    #[tokio::test]
    async fn a_missing_socket_is_named() {
        let error = version(Path::new("/nonexistent/c.sock")).await.unwrap_err();
        assert_eq!(error.to_string(), "Cannot reach containerd at /nonexistent/c.sock");
    }
}
