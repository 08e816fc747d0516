//! The agent's executable, checked: as PID 1 of a root without libraries it must be static.

use std::io;
use std::path::Path;

use crate::elf::{Elf, ElfError};

/// The file cannot be the guest's PID 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// It cannot be read.
    #[error("It cannot be read")]
    Read(#[from] io::Error),
    /// It is no executable for the guest's machine.
    #[error("It is no x86-64 executable")]
    Elf(#[from] ElfError),
    /// It is linked dynamically.
    #[error("It needs a dynamic loader, which the guest does not have; link it statically (crt-static)")]
    Dynamic,
}

/// Reads the executable at `path`.
pub fn load(path: &Path) -> Result<Vec<u8>, AgentError> {
    let bytes = std::fs::read(path)?;
    if Elf::parse(&bytes)?.has_interpreter() {
        return Err(AgentError::Dynamic);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_executable_is_taken() {
        // This test itself is built static, as everything here.
        let own = std::env::current_exe().unwrap();
        assert_eq!(load(&own).unwrap(), std::fs::read(own).unwrap());
    }

    #[test]
    fn a_dynamic_executable_is_refused() {
        assert!(matches!(load(Path::new("/bin/sh")), Err(AgentError::Dynamic)));
    }

    #[test]
    fn a_text_file_is_refused() {
        assert!(matches!(load(Path::new("/etc/os-release")), Err(AgentError::Elf(_))));
    }
}
