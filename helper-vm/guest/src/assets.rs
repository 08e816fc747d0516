//! The asset directory: written so that a manifest is only ever seen with the files that it describes,
//! and checked against its manifest.
//!
//! ```text
//!   write temporary files, fsync ─> remove manifest ─> rename kernel, initramfs ─> rename manifest ─> fsync DIR
//! ```

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;
use vmctr_proto::manifest::{AssetFile, GuestManifest, MANIFEST_FILE, MANIFEST_VERSION};

/// Name of the kernel in the asset directory, whatever its format.
pub const KERNEL_FILE: &str = "vmlinux";

/// Name of the initramfs in the asset directory.
pub const INITRAMFS_FILE: &str = "initramfs.cpio";

/// The asset directory cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file operation failed.
    #[error("{action} {path} failed")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The manifest cannot be written as JSON.
    #[error("The manifest cannot be written as JSON")]
    Json(#[from] serde_json::Error),
}

/// The asset directory is not whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InspectError {
    /// There is no manifest.
    #[error("{path} cannot be read; build guest assets with `vmctr guest build`")]
    NoManifest {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The manifest is not one.
    #[error("{path} is no manifest of this version's format; build guest assets with `vmctr guest build`")]
    Format {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is of another version.
    #[error(
        "{path} has format version {found}, this program reads {MANIFEST_VERSION}; build guest assets anew"
    )]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// The manifest names a file elsewhere.
    #[error("The manifest names {0:?}, which is no file name")]
    FileName(String),
    /// A file is missing.
    #[error("{path} cannot be read; build guest assets anew")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not the one that the manifest describes.
    #[error(
        "{path} is not the file that its manifest describes: {found}, not {stated}; build guest assets anew"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Size or digest found.
        found: String,
        /// Size or digest stated.
        stated: String,
    },
}

/// The manifest's entry for a file with these contents.
pub fn describe(file: &str, contents: &[u8]) -> AssetFile {
    AssetFile { file: file.to_owned(), size: contents.len() as u64, sha256: sha256(contents) }
}

fn sha256(contents: &[u8]) -> String {
    Sha256::digest(contents).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fills `dir` with the assets, replacing earlier ones.
pub fn store(
    dir: &Path,
    manifest: &GuestManifest,
    kernel: &[u8],
    initramfs: &[u8],
) -> Result<(), StoreError> {
    std::fs::create_dir_all(dir).map_err(failed("Making", dir))?;
    let mut json = serde_json::to_vec_pretty(manifest)?;
    json.push(b'\n');
    let kernel = write_temporary(dir, kernel)?;
    let initramfs = write_temporary(dir, initramfs)?;
    let described = write_temporary(dir, &json)?;

    remove(&dir.join(MANIFEST_FILE))?;
    rename(kernel, &dir.join(&manifest.kernel.file))?;
    rename(initramfs, &dir.join(&manifest.initramfs.file))?;
    rename(described, &dir.join(MANIFEST_FILE))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("Syncing", dir))
}

/// A synced file in `dir` that vanishes unless renamed.
fn write_temporary(dir: &Path, contents: &[u8]) -> Result<NamedTempFile, StoreError> {
    let write = || -> io::Result<NamedTempFile> {
        let mut file = NamedTempFile::new_in(dir)?;
        file.write_all(contents)?;
        file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        Ok(file)
    };
    write().map_err(failed("Writing a file in", dir))
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("Removing", path)(error)),
        _ => Ok(()),
    }
}

fn rename(file: NamedTempFile, path: &Path) -> Result<(), StoreError> {
    file.persist(path).map(drop).map_err(|error| failed("Writing", path)(error.error))
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

/// Reads the manifest in `dir` and checks the files against it, digests included.
///
/// # Errors
/// When the manifest is missing or of another format, or a file is not the one that it describes.
pub fn inspect(dir: &Path) -> Result<GuestManifest, InspectError> {
    let manifest = read_manifest(&dir.join(MANIFEST_FILE))?;
    for file in [&manifest.kernel, &manifest.initramfs] {
        verify(dir, file)?;
    }
    Ok(manifest)
}

fn read_manifest(path: &Path) -> Result<GuestManifest, InspectError> {
    let json =
        std::fs::read(path).map_err(|source| InspectError::NoManifest { path: path.to_owned(), source })?;
    let format = |source| InspectError::Format { path: path.to_owned(), source };
    // The version first: another version's fields would only confuse the message.
    let value: serde_json::Value = serde_json::from_slice(&json).map_err(format)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(found) if found != u64::from(MANIFEST_VERSION) => {
            Err(InspectError::Version { path: path.to_owned(), found })
        }
        _ => serde_json::from_value(value).map_err(format),
    }
}

fn verify(dir: &Path, stated: &AssetFile) -> Result<(), InspectError> {
    if Path::new(&stated.file).file_name() != Some(stated.file.as_ref()) {
        return Err(InspectError::FileName(stated.file.clone()));
    }
    let path = dir.join(&stated.file);
    let contents =
        std::fs::read(&path).map_err(|source| InspectError::Unreadable { path: path.clone(), source })?;
    let found = describe(&stated.file, &contents);
    if found.size != stated.size {
        return Err(changed(path, &format!("{} bytes", found.size), &stated.size.to_string()));
    }
    if found.sha256 != stated.sha256 {
        return Err(changed(path, &found.sha256, &stated.sha256));
    }
    Ok(())
}

fn changed(path: PathBuf, found: &str, stated: &str) -> InspectError {
    InspectError::Changed { path, found: found.to_owned(), stated: stated.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &[u8] = b"kernel";
    const INITRAMFS: &[u8] = b"initramfs";

    fn manifest() -> GuestManifest {
        GuestManifest {
            version: MANIFEST_VERSION,
            kernel_release: "6.12".to_owned(),
            kernel_source: "linux-image-6.12 6.12-1".to_owned(),
            hard_links: true,
            kernel: describe(KERNEL_FILE, KERNEL),
            initramfs: describe(INITRAMFS_FILE, INITRAMFS),
            agent_version: "0.1.0".to_owned(),
            modules: vec!["overlay".to_owned()],
        }
    }

    fn stored() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), &manifest(), KERNEL, INITRAMFS).unwrap();
        dir
    }

    fn refusal(dir: &Path) -> String {
        inspect(dir).unwrap_err().to_string()
    }

    #[test]
    fn a_digest_is_the_known_one() {
        // First test vector of FIPS 180-2.
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn what_was_stored_is_whole_and_nothing_else_is_left() {
        let dir = stored();
        store(dir.path(), &manifest(), KERNEL, INITRAMFS).unwrap();
        assert_eq!(inspect(dir.path()).unwrap(), manifest());
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, [INITRAMFS_FILE, MANIFEST_FILE, KERNEL_FILE]);
    }

    #[test]
    fn other_users_may_read_the_files() {
        let dir = stored();
        let mode = std::fs::metadata(dir.path().join(KERNEL_FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
    }

    #[test]
    fn a_changed_file_is_found() {
        let dir = stored();
        std::fs::write(dir.path().join(KERNEL_FILE), b"kernal").unwrap();
        assert!(refusal(dir.path()).contains("vmlinux is not the file"));
        std::fs::write(dir.path().join(KERNEL_FILE), b"kern").unwrap();
        assert!(refusal(dir.path()).contains("4 bytes, not 6"));
        std::fs::remove_file(dir.path().join(KERNEL_FILE)).unwrap();
        assert!(refusal(dir.path()).contains("vmlinux cannot be read"));
    }

    #[test]
    fn a_directory_without_manifest_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refusal(dir.path()).contains("vmctr guest build"));
    }

    #[test]
    fn another_version_is_named() {
        let dir = stored();
        std::fs::write(dir.path().join(MANIFEST_FILE), r#"{"version": 7, "new": 1}"#).unwrap();
        assert!(refusal(dir.path()).contains("format version 7"));
    }

    #[test]
    fn a_manifest_cannot_point_elsewhere() {
        for file in ["../vmlinux", "/etc/os-release", "a/b", ".", ""] {
            let dir = stored();
            let mut elsewhere = manifest();
            elsewhere.kernel.file = file.to_owned();
            let json = serde_json::to_vec(&elsewhere).unwrap();
            std::fs::write(dir.path().join(MANIFEST_FILE), json).unwrap();
            assert!(matches!(inspect(dir.path()), Err(InspectError::FileName(_))), "{file}");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let error = store(Path::new("/dev/null/guest"), &manifest(), KERNEL, INITRAMFS).unwrap_err();
        assert_eq!(error.to_string(), "Making /dev/null/guest failed");
    }
}
