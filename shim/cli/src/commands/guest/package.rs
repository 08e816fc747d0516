//! The distribution's cloud kernel, fetched by apt into a temporary directory: unpacked later, never installed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// The package that depends on the newest cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Debian releases whose own kernel is older than backports' by so much that a module is missing or slow.
const PREFERS_BACKPORTS: [&str; 1] = ["bookworm"];

/// A kernel package in a directory that goes with this value.
pub struct Download {
    _dir: TempDir,
    deb: PathBuf,
}

/// The package cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Cannot run {command}, so no kernel can be downloaded: this needs Debian's apt")]
    NoApt {
        command: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("apt knows of no package {META_PACKAGE}")]
    NoPackage,
    #[error("apt-get download {package} failed: {message}")]
    Download { package: String, message: String },
    #[error("No temporary directory can be made")]
    Temp(#[source] io::Error),
    #[error("apt-get download {package} left no package")]
    Nothing { package: String },
}

impl Download {
    /// Downloads the cloud kernel that apt offers now.
    pub fn cloud_kernel() -> Result<Self, Error> {
        let package = offered()?;
        let dir = TempDir::with_prefix("vmctr-kernel-").map_err(Error::Temp)?;
        download(&package, dir.path())?;
        let deb = find_deb(dir.path()).ok_or(Error::Nothing { package })?;
        Ok(Self { _dir: dir, deb })
    }

    /// The package.
    pub fn deb(&self) -> &Path {
        &self.deb
    }
}

/// `PACKAGE=VERSION` of the newest cloud kernel.
fn offered() -> Result<String, Error> {
    for name in meta_packages(&fs::read_to_string("/etc/os-release").unwrap_or_default()) {
        if let Some(package) = depends(&show(&name)?) {
            return Ok(package);
        }
    }
    Err(Error::NoPackage)
}

/// Where to look, best first.
fn meta_packages(os_release: &str) -> Vec<String> {
    let codename = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let backports = codename.filter(|codename| PREFERS_BACKPORTS.contains(codename));
    let backports = backports.map(|codename| format!("{META_PACKAGE}/{codename}-backports"));
    backports.into_iter().chain([META_PACKAGE.to_owned()]).collect()
}

fn show(name: &str) -> Result<String, Error> {
    let output = Command::new("apt-cache")
        .args(["show", "--no-all-versions", name])
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::NoApt { command: "apt-cache", source })?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From `Depends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)`.
fn depends(record: &str) -> Option<String> {
    let depends = record.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let kernel = depends.split(", ").find(|package| package.starts_with("linux-image-"))?;
    let (package, version) = kernel.split_once(" (= ")?;
    Some(format!("{package}={}", version.strip_suffix(')')?))
}

/// apt's own unprivileged user may not write to the directory, so the download runs as the caller.
fn download(package: &str, dir: &Path) -> Result<(), Error> {
    let output = Command::new("apt-get")
        .args(["-o", "APT::Sandbox::User=root", "--quiet", "download", package])
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::NoApt { command: "apt-get", source })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(Error::Download { package: package.to_owned(), message })
}

fn find_deb(dir: &Path) -> Option<PathBuf> {
    let paths = fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    paths.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "deb"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_read_from_the_meta_packages_dependencies() {
        let record = "Package: linux-image-cloud-amd64\nDepends: linux-base, linux-image-6.12-cloud-amd64 (= 6.12.1-1)\n";
        assert_eq!(depends(record).as_deref(), Some("linux-image-6.12-cloud-amd64=6.12.1-1"));
        assert_eq!(depends("Package: x\n"), None);
        assert_eq!(depends("Depends: linux-image-6.12-cloud-amd64\n"), None);
    }

    #[test]
    fn an_old_release_looks_into_backports_first() {
        let names = meta_packages("ID=debian\nVERSION_CODENAME=bookworm\n");
        assert_eq!(names, ["linux-image-cloud-amd64/bookworm-backports", "linux-image-cloud-amd64"]);
        assert_eq!(meta_packages("VERSION_CODENAME=trixie\n"), ["linux-image-cloud-amd64"]);
    }
}
