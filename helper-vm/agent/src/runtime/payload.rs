//! The last step of a container's process: finding its program and becoming it.
//!
//! Runs inside the container, as the container's user. A failure reaches PID 1 in the words that other
//! runtimes use, before the process waits for its start where the program is already known not to run.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Process, Spec};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access, execve};

use super::null;
use super::report::Reporter;
use super::seccomp::Confinement;

/// The program cannot be executed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum ProgramError {
    #[error("process.args is empty")]
    NoArguments,
    #[error("process.args holds a NUL byte")]
    Nul,
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    #[error("exec: {name:?}: {}", error.desc())]
    Unusable { name: String, error: Errno },
}

/// Executes the program that the spec names.
#[derive(Clone)]
pub struct Payload {
    reporter: Reporter,
    confinement: Confinement,
}

impl Payload {
    /// A program that gives up `confinement` before it runs.
    pub fn new(reporter: Reporter, confinement: Confinement) -> Self {
        Self { reporter, confinement }
    }

    fn execute(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let args = process.args().as_deref().unwrap_or_default();
        let program = find(process)?;
        let arguments = strings(args.iter().map(|arg| arg.as_bytes().to_vec()))?;
        let environment = strings(std::env::vars_os().map(pair))?;
        let path = CString::new(program.as_os_str().as_bytes()).map_err(|_| ProgramError::Nul)?;
        // A container may have taken /dev/null away from itself; it then has what libcontainer gave it.
        let _ = null::reopen();
        self.confinement.enter()?;
        crate::sys::default_sigpipe();
        let Err(error) = execve(&path, &arguments, &environment);
        Err(ProgramError::Unusable { name: args[0].clone(), error }.into())
    }
}

impl Executor for Payload {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        let found = process.ok_or(ProgramError::NoArguments).and_then(find);
        found.map(drop).map_err(|error| {
            self.reporter.error(&error.to_string());
            ExecutorValidationError::ArgValidationError(error.to_string())
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        self.execute(spec).inspect_err(|error| self.reporter.error(&error.to_string()))
    }
}

impl From<ProgramError> for ExecutorError {
    fn from(error: ProgramError) -> Self {
        Self::Other(error.to_string())
    }
}

fn pair((name, value): (std::ffi::OsString, std::ffi::OsString)) -> Vec<u8> {
    [name.as_bytes(), b"=", value.as_bytes()].concat()
}

fn strings(values: impl Iterator<Item = Vec<u8>>) -> Result<Vec<CString>, ProgramError> {
    values.map(|value| CString::new(value).map_err(|_| ProgramError::Nul)).collect()
}

/// The program's path: as named when it holds a slash, else the first fitting one of $PATH.
fn find(process: &Process) -> Result<PathBuf, ProgramError> {
    let name = process.args().as_deref().and_then(<[_]>::first).ok_or(ProgramError::NoArguments)?;
    if name.contains('/') {
        return usable(Path::new(name))
            .map(|()| PathBuf::from(name))
            .map_err(|error| ProgramError::Unusable { name: name.clone(), error });
    }
    let mut denied = None;
    for folder in search_path(process).split(':') {
        // An empty entry means the working directory.
        let path = Path::new(if folder.is_empty() { "." } else { folder }).join(name);
        match usable(&path) {
            Ok(()) => return Ok(path),
            Err(error @ Errno::EACCES) => denied = Some(error),
            Err(_) => {}
        }
    }
    Err(match denied {
        Some(error) => ProgramError::Unusable { name: name.clone(), error },
        None => ProgramError::NotInPath(name.clone()),
    })
}

fn search_path(process: &Process) -> &str {
    let variables = process.env().as_deref().unwrap_or_default();
    variables.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or("/nonexistent")
}

fn usable(path: &Path) -> Result<(), Errno> {
    let metadata = path.metadata().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    access(OsStr::new(path), AccessFlags::X_OK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::ProcessBuilder;
    use std::os::unix::fs::PermissionsExt;

    fn process(program: &str, path: &str) -> Process {
        let env = vec!["PATH=/wrong".to_owned(), format!("PATH={path}")];
        ProcessBuilder::default().args([program.to_owned()]).env(env).build().unwrap()
    }

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let tool = dir.path().join("tool");
        std::fs::write(&tool, "").unwrap();
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o700)).unwrap();
        let path = format!("/nonexistent:{}", dir.path().display());
        assert_eq!(find(&process("tool", &path)), Ok(tool.clone()));
        assert_eq!(find(&process(tool.to_str().unwrap(), "")), Ok(tool));
    }

    #[test]
    fn failures_name_the_program_and_the_cause() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o600)).unwrap();
        let path = dir.path().to_str().unwrap();
        let text = |program: &str| find(&process(program, path)).unwrap_err().to_string();
        assert_eq!(text("nope"), "exec: \"nope\": executable file not found in $PATH");
        assert_eq!(text("/no/pe"), "exec: \"/no/pe\": No such file or directory");
        assert_eq!(text("plain"), "exec: \"plain\": Permission denied");
        assert_eq!(text(path), format!("exec: {path:?}: Is a directory"));
    }
}
