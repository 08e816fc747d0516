//! Checks of containerd: does it answer, and does it find the shim?

use std::path::Path;

use super::report::Check;
use crate::containerd::{self, SHIM};
use crate::failure::one_line;

/// containerd answers gRPC on its socket.
pub async fn reachable(address: &Path) -> Check {
    let name = "containerd";
    match containerd::version(address).await {
        Ok(version) => Check::ok(name, format!("{version} at {}", address.display())),
        Err(error) => Check::error(
            name,
            error,
            "systemctl start containerd, or name its socket: vmctr -a SOCKET doctor",
        ),
    }
}

/// The containerd behind the socket finds the shim's binary.
pub fn sees_shim(address: &Path) -> Check {
    let name = "shim";
    let found = containerd::server_pid(address).and_then(|pid| containerd::find_shim(pid, SHIM));
    match found {
        Ok(Some(path)) => Check::ok(name, format!("containerd finds {}", path.display())),
        Ok(None) => Check::fail(name, format!("{SHIM} is not in containerd's PATH"), install_hint()),
        Err(containerd::Error::Connect { .. }) => {
            Check::warn(name, format!("cannot tell whether containerd finds {SHIM}"), "see containerd")
        }
        Err(error) => Check::warn(
            name,
            format!("cannot tell whether containerd finds {SHIM}: {}", one_line(&error.into())),
            "run as root on the machine where containerd runs",
        ),
    }
}

/// A link to the shim beside this program, when there is one; else the installation.
fn install_hint() -> String {
    let beside =
        std::env::current_exe().ok().map(|exe| exe.with_file_name(SHIM)).filter(|shim| shim.is_file());
    match beside {
        Some(shim) => format!("ln -s {} /usr/local/bin/", shim.display()),
        None => "make install".to_owned(),
    }
}
