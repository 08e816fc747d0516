//! Who keeps a mount alive that was taken away: another mount of it, here or in another mount namespace, or a process
//! that has something of it open.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::table;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// It is mounted here, too.
    Mount(PathBuf),
    /// It is mounted where this process sees it.
    Elsewhere(String, PathBuf),
    /// This process has a file or folder of it open, or runs a program of it.
    Process(String),
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount(point) => write!(f, "it is mounted on {}, too", point.display()),
            Self::Elsewhere(pid, point) => {
                let point = point.display();
                write!(f, "process {pid} has it mounted on {point}, in a mount namespace of its own")
            }
            Self::Process(pid) => write!(f, "process {pid} has a file or folder of it open"),
        }
    }
}

/// Whoever keeps the file system with this device.
pub fn find(device: &str) -> Option<User> {
    let mounted = |lines: Vec<table::Line>| {
        lines.into_iter().find(|line| line.is_ours() && line.device == device).map(|line| line.point)
    };
    if let Some(point) = mounted(table::own()) {
        return Some(User::Mount(point));
    }
    let mut seen = BTreeSet::from_iter(namespace("self"));
    for pid in processes() {
        let is_new = namespace(&pid).is_some_and(|namespace| seen.insert(namespace));
        let table = if is_new { fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok() } else { None };
        if let Some(point) = table.and_then(|table| mounted(table::parse(&table))) {
            return Some(User::Elsewhere(pid, point));
        }
    }
    processes().find(|pid| has_open(pid, device)).map(User::Process)
}

fn processes() -> impl Iterator<Item = String> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
}

fn namespace(pid: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()
}

fn has_open(pid: &str, device: &str) -> bool {
    let process = Path::new("/proc").join(pid);
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    files
        .chain(["cwd", "root", "exe"].map(|name| process.join(name)))
        .any(|path| device_of(&path).as_deref() == Some(device))
}

/// Nobody's server is asked: it may not answer.
fn device_of(path: &Path) -> Option<String> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).ok()?;
    Some(format!("{}:{}", found.stx_dev_major, found.stx_dev_minor))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn whoever_runs_a_program_is_found() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let program = dir.path().join("program");
        // Not by this process: a child of another test's would keep it open for writing for a moment.
        assert!(Command::new("cp").arg("/bin/sleep").arg(&program).status().unwrap().success());
        let mut child = Command::new(&program).arg("60").spawn().unwrap();
        let found = has_open(&child.id().to_string(), &device_of(&program).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found);
    }

    #[test]
    fn whoever_has_a_file_open_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let _open = fs::File::create(dir.path().join("file")).unwrap();
        let device = device_of(dir.path()).unwrap();
        let this = std::process::id().to_string();
        assert!(has_open(&this, &device));
        assert!(!has_open(&this, "9999:9"));
        assert_eq!(find("9999:9"), None);
    }
}
