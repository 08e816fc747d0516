//! How containerd runs this program.
//!
//! ```text
//!   containerd ── start ──> start: spawns the server, prints its address, ends
//!              <─ ttrpc ──> server (no action): the shim proper
//!              ── delete ─> delete: removes what a killed server left, prints how the container ended
//!              ── -info ──> info: what this runtime is
//!   vmctr pool run ── warm ─> member: waits with a VM until `start` wants a server, and then is that
//! ```

pub mod delete;
pub mod info;
pub mod member;
mod pool;
pub mod server;
pub mod start;

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Environment variable with containerd's ttrpc address.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// File in the bundle where containerd finds the address after its restart.
const ADDRESS_FILE: &str = "address";

/// The file behind a socket's address.
fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

/// Removes a socket; anything else at its place stays.
fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is not a socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Where the container's address is kept.
fn address_file(bundle: &Path) -> PathBuf {
    bundle.join(ADDRESS_FILE)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_sockets_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, file) = (dir.path().join("socket"), dir.path().join("file"));
        let _listener = UnixListener::bind(&socket).unwrap();
        fs::write(&file, "").unwrap();
        remove_socket(socket_path(&format!("unix://{}", socket.display()))).unwrap();
        assert!(!socket.exists());
        assert!(remove_socket(&file).is_err() && file.exists());
        remove_socket(&socket).unwrap();
    }
}
