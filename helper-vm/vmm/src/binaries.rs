//! Where the project's own binaries find each other: beside the running one, then in the libexec
//! directory of the same installation, then in the system's.

use std::env;
use std::path::{Path, PathBuf};

/// A binary of this project is missing.
#[derive(Debug, thiserror::Error)]
#[error("Cannot find {name}: looked for {}; install the package again or run `make build`", list(looked))]
pub struct BinaryError {
    name: &'static str,
    looked: Vec<PathBuf>,
}

/// Path of the project's binary with this name.
///
/// # Errors
/// When it is in none of the places, which the error lists.
pub fn find(name: &'static str) -> Result<PathBuf, BinaryError> {
    let looked = places(running_dir().as_deref(), name);
    match looked.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(BinaryError { name, looked }),
    }
}

/// Directory of the running executable, symlinks resolved.
pub(crate) fn running_dir() -> Option<PathBuf> {
    Some(env::current_exe().ok()?.parent()?.to_owned())
}

fn places(running_dir: Option<&Path>, name: &str) -> Vec<PathBuf> {
    let beside = running_dir.map(|dir| dir.join(name));
    let libexec = running_dir.map(|dir| dir.join("../libexec/vmctr").join(name));
    let system = Path::new("/usr/libexec/vmctr").join(name);
    beside.into_iter().chain(libexec).chain([system]).collect()
}

/// `a, b, c`, for error messages.
pub(crate) fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_binarys_directory_comes_first() {
        let places = places(Some(Path::new("/opt/vmctr/bin")), "vmctr-jail");
        assert_eq!(
            list(&places),
            "/opt/vmctr/bin/vmctr-jail, /opt/vmctr/bin/../libexec/vmctr/vmctr-jail, /usr/libexec/vmctr/vmctr-jail"
        );
    }

    #[test]
    fn a_missing_binary_is_named_with_the_places() {
        let message = find("vmctr-nonexistent").unwrap_err().to_string();
        assert!(message.contains("Cannot find vmctr-nonexistent"), "{message}");
        assert!(message.contains("/usr/libexec/vmctr/vmctr-nonexistent"), "{message}");
    }
}
