//! Names that the host gives to containers and processes, checked once at the edge.

use std::fmt;
use std::sync::Arc;

/// Longest accepted name; containerd allows 76 bytes.
const MAX_LENGTH: usize = 128;

/// The name cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} {name:?} is not 1 to {MAX_LENGTH} letters, digits, '.', '_', '-' or '+'")]
pub struct NameError {
    what: &'static str,
    name: String,
}

fn checked(what: &'static str, name: &str) -> Result<Arc<str>, NameError> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    if (1..=MAX_LENGTH).contains(&name.len()) && name.chars().all(legal) {
        Ok(name.into())
    } else {
        Err(NameError { what, name: name.chars().take(MAX_LENGTH).collect() })
    }
}

/// containerd's container ID.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerId(Arc<str>);

impl ContainerId {
    /// Checks the host's name.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        checked("container ID", name).map(Self)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A process of a container: its init, or an exec.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The container.
    pub container: ContainerId,
    /// `None` for the container's init process.
    pub exec: Option<Arc<str>>,
}

impl ProcessId {
    /// The container's init process.
    pub fn init(container: &ContainerId) -> Self {
        Self { container: container.clone(), exec: None }
    }

    /// Checks the host's names; an empty exec ID means the init process.
    pub fn parse(container: &str, exec: &str) -> Result<Self, NameError> {
        let container = ContainerId::parse(container)?;
        let exec = if exec.is_empty() { None } else { Some(checked("exec ID", exec)?) };
        Ok(Self { container, exec })
    }

    /// The name on the wire: empty for the init process.
    pub fn exec_name(&self) -> &str {
        self.exec.as_deref().unwrap_or_default()
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_or_noise_are_refused() {
        for bad in ["", "a/b", "a b", "é", "a\n", &"x".repeat(MAX_LENGTH + 1)] {
            assert!(ContainerId::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(ContainerId::parse("web-1.a_b+c").unwrap().to_string(), "web-1.a_b+c");
    }

    #[test]
    fn an_empty_exec_id_is_the_init_process() {
        let init = ProcessId::parse("c", "").unwrap();
        assert_eq!(init, ProcessId::init(&ContainerId::parse("c").unwrap()));
        let exec = ProcessId::parse("c", "e").unwrap();
        assert_eq!(exec.exec_name(), "e");
        assert_eq!(exec.to_string(), "exec e of container c");
    }
}
