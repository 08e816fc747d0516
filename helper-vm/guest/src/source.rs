//! Where the guest's kernel comes from: a Debian package, unpacked but not installed, or files.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A kernel and its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// A Debian kernel package (`linux-image-RELEASE_VERSION_ARCH.deb`).
    Deb(PathBuf),
    /// Files of the user's choice.
    Files {
        /// bzImage, or ELF with a PVH entry.
        vmlinuz: PathBuf,
        /// Directory that holds `modules.builtin` and `kernel/`, as `/lib/modules/RELEASE`.
        modules: PathBuf,
    },
}

/// The package or the files are not usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// There is no such file or directory, or it may not be read.
    #[error("{path} cannot be read")]
    Unreadable {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No temporary directory.
    #[error("No temporary directory can be made to unpack {deb}")]
    Temp {
        /// The package.
        deb: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `dpkg-deb` cannot be started.
    #[error("dpkg-deb cannot be run to unpack {deb}; install dpkg, or name a kernel and its modules")]
    NoDpkg {
        /// The package.
        deb: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `dpkg-deb` refused the file.
    #[error("{deb} is no Debian package that dpkg-deb can unpack: {message}")]
    NoPackage {
        /// The file.
        deb: PathBuf,
        /// What `dpkg-deb` says.
        message: String,
    },
    /// The package is another one.
    #[error(
        "{deb} holds no {what}; a kernel package is named linux-image-RELEASE, \
         not linux-image-cloud-amd64, which only depends on it"
    )]
    NoKernel {
        /// The package.
        deb: PathBuf,
        /// What is missing.
        what: &'static str,
    },
}

impl KernelSource {
    /// Finds kernel and modules, unpacking a package first.
    pub(crate) fn locate(&self) -> Result<Located, SourceError> {
        match self {
            Self::Deb(deb) => Located::unpack(deb),
            Self::Files { vmlinuz, modules } => Located::files(vmlinuz, modules),
        }
    }
}

/// Paths to a kernel and its modules, valid while this lives.
#[derive(Debug)]
pub(crate) struct Located {
    vmlinuz: PathBuf,
    modules: PathBuf,
    description: String,
    _unpacked: Option<TempDir>,
}

impl Located {
    pub fn vmlinuz(&self) -> &Path {
        &self.vmlinuz
    }

    pub fn modules(&self) -> &Path {
        &self.modules
    }

    /// Package name and version, or the kernel's path.
    pub fn description(&self) -> &str {
        &self.description
    }

    fn files(vmlinuz: &Path, modules: &Path) -> Result<Self, SourceError> {
        for path in [vmlinuz, modules] {
            check_exists(path)?;
        }
        Ok(Self {
            vmlinuz: vmlinuz.to_owned(),
            modules: modules.to_owned(),
            description: vmlinuz.display().to_string(),
            _unpacked: None,
        })
    }

    fn unpack(deb: &Path) -> Result<Self, SourceError> {
        check_exists(deb)?;
        let description = package_name(deb)?;
        let dir = tempfile::tempdir().map_err(|source| SourceError::Temp { deb: deb.to_owned(), source })?;
        dpkg_deb(deb, ["--extract".as_ref(), deb.as_os_str(), dir.path().as_os_str()])?;
        let missing = |what| SourceError::NoKernel { deb: deb.to_owned(), what };
        let vmlinuz = find_vmlinuz(dir.path()).ok_or_else(|| missing("kernel (/boot/vmlinuz-RELEASE)"))?;
        let modules = find_modules(dir.path()).ok_or_else(|| missing("modules (/lib/modules/RELEASE)"))?;
        Ok(Self { vmlinuz, modules, description, _unpacked: Some(dir) })
    }
}

fn check_exists(path: &Path) -> Result<(), SourceError> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(SourceError::Unreadable { path: path.to_owned(), source }),
    }
}

fn package_name(deb: &Path) -> Result<String, SourceError> {
    let format = OsStr::new("--showformat=${Package} ${Version}");
    let output = dpkg_deb(deb, ["--show".as_ref(), format, deb.as_os_str()])?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn dpkg_deb<const N: usize>(deb: &Path, args: [&OsStr; N]) -> Result<Output, SourceError> {
    let output = Command::new("dpkg-deb")
        .args(args)
        .output()
        .map_err(|source| SourceError::NoDpkg { deb: deb.to_owned(), source })?;
    if output.status.success() {
        return Ok(output);
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(SourceError::NoPackage { deb: deb.to_owned(), message })
}

fn find_vmlinuz(root: &Path) -> Option<PathBuf> {
    only_entry(&root.join("boot"), |name| name.starts_with("vmlinuz-"))
}

/// `/lib/modules`, or `/usr/lib/modules` where the distribution merged `/lib` into `/usr`.
fn find_modules(root: &Path) -> Option<PathBuf> {
    ["lib/modules", "usr/lib/modules"].iter().find_map(|dir| only_entry(&root.join(dir), |_| true))
}

fn only_entry(dir: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?.filter_map(Result::ok);
    entries
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(OsStr::to_str).is_some_and(&wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packs `files` (all empty) as Debian package `name` 1.2-3.
    fn deb(dir: &Path, name: &str, files: &[&str]) -> PathBuf {
        let tree = dir.join("tree");
        std::fs::create_dir_all(tree.join("DEBIAN")).unwrap();
        let control = format!(
            "Package: {name}\nVersion: 1.2-3\nArchitecture: amd64\nMaintainer: A <a@b.c>\nDescription: x\n"
        );
        std::fs::write(tree.join("DEBIAN/control"), control).unwrap();
        for file in files {
            std::fs::create_dir_all(tree.join(file).parent().unwrap()).unwrap();
            std::fs::write(tree.join(file), "").unwrap();
        }
        let deb = dir.join(format!("{name}.deb"));
        let built = Command::new("dpkg-deb").arg("--build").arg(tree).arg(&deb).output().unwrap();
        assert!(built.status.success(), "{built:?}");
        deb
    }

    #[test]
    fn both_module_directories_are_found() {
        for modules in ["lib/modules/6.1-a", "usr/lib/modules/6.1-a"] {
            let dir = tempfile::tempdir().unwrap();
            let builtin = format!("{modules}/modules.builtin");
            let deb = deb(dir.path(), "linux-image-6.1-a", &["boot/vmlinuz-6.1-a", "boot/config", &builtin]);
            let located = KernelSource::Deb(deb).locate().unwrap();
            assert_eq!(located.description(), "linux-image-6.1-a 1.2-3");
            assert!(located.vmlinuz().ends_with("boot/vmlinuz-6.1-a"));
            assert!(located.modules().ends_with(modules));
            let unpacked = located.vmlinuz().to_owned();
            drop(located);
            assert!(!unpacked.exists());
        }
    }

    #[test]
    fn a_package_without_a_kernel_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let deb = deb(dir.path(), "linux-image-cloud-amd64", &["usr/share/doc/readme"]);
        let error = KernelSource::Deb(deb).locate().unwrap_err();
        assert!(error.to_string().contains("linux-image-cloud-amd64.deb holds no kernel"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_package_is_named() {
        let error = KernelSource::Deb("/etc/os-release".into()).locate().unwrap_err();
        assert!(matches!(error, SourceError::NoPackage { .. }));
        assert!(error.to_string().starts_with("/etc/os-release is no Debian package"), "{error}");
    }

    #[test]
    fn a_missing_path_is_named() {
        let files = KernelSource::Files { vmlinuz: "/etc/os-release".into(), modules: "/no/such".into() };
        for source in [files, KernelSource::Deb("/no/such".into())] {
            assert_eq!(source.locate().unwrap_err().to_string(), "/no/such cannot be read");
        }
    }
}
