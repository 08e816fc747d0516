//! QEMU as a program: where it is, which version it is, and ([`command`]) how it is called.

pub mod command;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fmt, fs, io};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::run_dir::{make_dir, write_whole};

/// Name in PATH.
const PROGRAM: &str = "qemu-system-x86_64";

/// First version whose vhost-user devices carry the state that this project relies on.
pub const VERSION_MIN: QemuVersion = QemuVersion { major: 8, minor: 2, micro: 0 };

/// `major.minor.micro`, ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion {
    /// Changes once a year.
    pub major: u32,
    /// Changes with each feature release.
    pub minor: u32,
    /// Changes with each fix release.
    pub micro: u32,
}

/// A QEMU that is new enough.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qemu {
    path: PathBuf,
    version: QemuVersion,
}

/// No usable QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// Not in PATH.
    #[error(
        "Cannot find {PROGRAM} in PATH: install the package qemu-system-x86, or set `qemu` in the config"
    )]
    Missing,
    /// It does not run.
    #[error("Cannot run {} --version", path.display())]
    Run {
        /// The binary.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Its answer holds no version.
    #[error("{} --version answers {answer:?}, which is no QEMU version", path.display())]
    NoVersion {
        /// The binary.
        path: PathBuf,
        /// First line of its answer.
        answer: String,
    },
    /// Older than [`VERSION_MIN`].
    #[error("{} is version {found}, but {VERSION_MIN} or newer is needed: on Debian 12 install qemu-system-x86 from bookworm-backports", path.display())]
    TooOld {
        /// The binary.
        path: PathBuf,
        /// Its version.
        found: QemuVersion,
    },
}

impl Qemu {
    /// The config's `qemu`, else the first one in PATH or, for a caller with a bare environment, `/usr/bin`.
    ///
    /// # Errors
    /// None there, one that does not run, or one that is too old.
    pub fn find(config: &Config) -> Result<Self, QemuError> {
        let path = config.qemu.clone().or_else(in_path).ok_or(QemuError::Missing)?;
        Self::at(&path)
    }

    /// As [`Qemu::find`], but asks a binary for its version once only: the answer is kept in the run directory
    /// until the file changes. Without a run directory that can be written to, it is asked each time.
    ///
    /// # Errors
    /// As for [`Qemu::find`].
    pub fn find_known(config: &Config) -> Result<Self, QemuError> {
        let path = config.qemu.clone().or_else(in_path).ok_or(QemuError::Missing)?;
        let memory = config.run_dir.join("qemu.json");
        let id = FileId::of(&path).ok();
        if let Some(known) = Known::read(&memory).filter(|known| Some(&known.id) == id.as_ref()) {
            return known.qemu.new_enough();
        }
        let qemu = Self::at(&path)?;
        if let Some(id) = id {
            // It is asked again then.
            let _ = Known { id, qemu: qemu.clone() }.write(&memory);
        }
        Ok(qemu)
    }

    /// The QEMU at this path.
    ///
    /// # Errors
    /// As for [`Qemu::find`].
    pub fn at(path: &Path) -> Result<Self, QemuError> {
        let run = |source| QemuError::Run { path: path.to_owned(), source };
        let path = fs::canonicalize(path).map_err(run)?;
        let answer = ask_version(&path).map_err(run)?;
        let Some(version) = parse_version(&answer) else {
            let answer = answer.lines().next().unwrap_or_default().chars().take(80).collect();
            return Err(QemuError::NoVersion { path, answer });
        };
        Self { path, version }.new_enough()
    }

    fn new_enough(self) -> Result<Self, QemuError> {
        if self.version < VERSION_MIN {
            return Err(QemuError::TooOld { path: self.path, found: self.version });
        }
        Ok(self)
    }

    /// The binary, symlinks resolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> QemuVersion {
        self.version
    }
}

/// A file as it is now: a package's update gives another inode or another time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileId {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl FileId {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let found = fs::metadata(&path)?;
        let modified = (found.mtime(), found.mtime_nsec());
        Ok(Self { device: found.dev(), inode: found.ino(), size: found.size(), modified, path })
    }
}

/// `qemu.json`: a binary that was asked already.
#[derive(Serialize, Deserialize)]
struct Known {
    id: FileId,
    qemu: Qemu,
}

impl Known {
    fn read(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }

    fn write(&self, file: &Path) -> io::Result<()> {
        if let Some(dir) = file.parent() {
            make_dir(dir)?;
        }
        write_whole(file, &serde_json::to_vec(self)?)
    }
}

fn in_path() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain([PathBuf::from("/usr/bin")]);
    dirs.map(|dir| dir.join(PROGRAM)).find(|file| file.is_absolute() && file.is_file())
}

fn ask_version(path: &Path) -> io::Result<String> {
    let output = Command::new(path).arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From `QEMU emulator version 10.0.2 (Debian ...)`.
fn parse_version(answer: &str) -> Option<QemuVersion> {
    let number = answer.strip_prefix("QEMU emulator version ")?.split([' ', '\n']).next()?;
    let mut parts = number.split('.').map(|part| part.parse::<u32>().ok());
    let version = QemuVersion {
        major: parts.next()??,
        minor: parts.next()??,
        micro: parts.next().flatten().unwrap_or(0),
    };
    Some(version)
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::put_script;

    fn version(major: u32, minor: u32, micro: u32) -> QemuVersion {
        QemuVersion { major, minor, micro }
    }

    #[test]
    fn versions_are_read_from_what_distributions_print() {
        for (answer, want) in [
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright\n", Some(version(10, 0, 2))),
            ("QEMU emulator version 8.2.0\n", Some(version(8, 2, 0))),
            ("QEMU emulator version 9.0.50 (v9.0.0-1-gabc)\n", Some(version(9, 0, 50))),
            ("bash 5.2\n", None),
            ("QEMU emulator version x.y\n", None),
            ("", None),
        ] {
            assert_eq!(parse_version(answer), want, "{answer}");
        }
    }

    fn fake(answer: &str) -> Result<Qemu, QemuError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu");
        put_script(&path, &format!("#!/bin/sh\necho '{answer}'\n"));
        Qemu::at(&path)
    }

    #[test]
    fn an_old_qemu_is_refused_with_both_versions() {
        let message = fake("QEMU emulator version 7.2.11 (Debian)").unwrap_err().to_string();
        assert!(message.contains("is version 7.2.11, but 8.2.0 or newer"), "{message}");
        assert_eq!(fake("QEMU emulator version 8.2.0").unwrap().version(), VERSION_MIN);
    }

    #[test]
    fn something_else_is_refused() {
        assert!(matches!(fake("hello"), Err(QemuError::NoVersion { .. })));
        assert!(matches!(Qemu::at(Path::new("/nonexistent")), Err(QemuError::Run { .. })));
    }

    #[test]
    fn a_binary_is_asked_again_only_when_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu");
        let config =
            Config { run_dir: dir.path().join("run"), qemu: Some(path.clone()), ..Config::default() };
        let put = |version: &str| {
            fs::remove_file(&path).unwrap_or_default();
            let script = format!(
                "#!/bin/sh\necho x >> {}/asked\necho 'QEMU emulator version {version}'\n",
                dir.path().display()
            );
            put_script(&path, &script);
        };
        let asked = || fs::read_to_string(dir.path().join("asked")).unwrap().lines().count();
        put("9.1.0");
        for _ in 0..3 {
            assert_eq!(Qemu::find_known(&config).unwrap().version(), version(9, 1, 0));
        }
        assert_eq!(asked(), 1);
        put("10.0.2");
        assert_eq!(Qemu::find_known(&config).unwrap().version(), version(10, 0, 2));
        assert_eq!(asked(), 2);
        fs::write(config.run_dir.join("qemu.json"), "{").unwrap();
        assert_eq!(Qemu::find_known(&config).unwrap().version(), version(10, 0, 2));
        assert_eq!(asked(), 3);
    }
}
