//! The guest's kernel and initramfs: finds the directory that `vmctr guest build` filled, and refuses one
//! that is incomplete. Its layout is in [`vmctr_proto::manifest`].
//!
//! Each start checks format, names and sizes; [`GuestAssets::verify`] also reads every byte.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::{env, fmt, io};

use sha2::{Digest, Sha256};
use vmctr_proto::manifest::{AssetFile, GuestManifest, MANIFEST_FILE, MANIFEST_VERSION};

use crate::binaries::{list, running_dir};
use crate::config::Config;

/// Environment variable that names the directory.
pub const GUEST_DIR_ENV: &str = "VMCTR_GUEST_DIR";

const SYSTEM_DIR: &str = "/usr/share/vmctr/guest";

/// A complete asset directory.
#[derive(Clone, Debug)]
pub struct GuestAssets {
    dir: PathBuf,
    manifest: GuestManifest,
}

/// The guest assets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    /// No directory with a manifest.
    #[error("No guest kernel found: looked in {}; build one with `vmctr guest build`", list(looked))]
    Missing {
        /// The directories.
        looked: Vec<PathBuf>,
    },
    /// A file cannot be read.
    #[error("Cannot read the guest asset {}; build it again with `vmctr guest build`", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The manifest is no manifest.
    #[error("Cannot parse {}; build the guest assets again with `vmctr guest build`", file.display())]
    Manifest {
        /// The file.
        file: PathBuf,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// Another format version.
    #[error("{} has format version {found}, this build reads version {MANIFEST_VERSION}; build the guest assets again with `vmctr guest build`", file.display())]
    Version {
        /// The manifest.
        file: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The manifest names a file outside its directory.
    #[error("{} names {name:?}, which is no plain file name", file.display())]
    Name {
        /// The manifest.
        file: PathBuf,
        /// As written.
        name: String,
    },
    /// A file is not what the manifest says.
    #[error("Guest asset {} has {property} {found}, but its manifest says {expected}; build it again with `vmctr guest build`", file.display())]
    Differs {
        /// The file.
        file: PathBuf,
        /// "size" or "sha256".
        property: &'static str,
        /// In the file.
        found: String,
        /// In the manifest.
        expected: String,
    },
    /// The kernel is neither an ELF file nor a bzImage.
    #[error("{} is no kernel: neither an ELF vmlinux nor a bzImage", file.display())]
    NoKernel {
        /// The file.
        file: PathBuf,
    },
}

impl GuestAssets {
    /// The directory named by `VMCTR_GUEST_DIR`, else the config's `guest_dir`; when neither is set, the
    /// first of `../guest` and `../share/vmctr/guest` beside the running binary and
    /// `/usr/share/vmctr/guest` that has a manifest.
    ///
    /// # Errors
    /// No directory, or one whose files do not match its manifest.
    pub fn find(config: &Config) -> Result<Self, AssetError> {
        let looked = places(env::var_os(GUEST_DIR_ENV).map(PathBuf::from), config, running_dir().as_deref());
        match looked.iter().find(|dir| dir.join(MANIFEST_FILE).is_file()) {
            Some(dir) => Self::open(dir),
            None => Err(AssetError::Missing { looked }),
        }
    }

    /// Opens one directory and checks names, sizes and that the kernel is one.
    ///
    /// # Errors
    /// As for [`GuestAssets::find`].
    pub fn open(dir: &Path) -> Result<Self, AssetError> {
        let manifest = read_manifest(&dir.join(MANIFEST_FILE))?;
        let dir =
            fs::canonicalize(dir).map_err(|source| AssetError::Read { file: dir.to_owned(), source })?;
        let assets = Self { dir, manifest };
        for file in [&assets.manifest.kernel, &assets.manifest.initramfs] {
            assets.check_size(file)?;
        }
        check_kernel(&assets.kernel())?;
        Ok(assets)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the directory holds.
    #[must_use]
    pub fn manifest(&self) -> &GuestManifest {
        &self.manifest
    }

    /// The kernel image.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(&self.manifest.kernel.file)
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join(&self.manifest.initramfs.file)
    }

    /// Compares the digests of all files with the manifest; reads everything, so not for each start.
    ///
    /// # Errors
    /// The first file that differs or cannot be read.
    pub fn verify(&self) -> Result<(), AssetError> {
        for file in [&self.manifest.kernel, &self.manifest.initramfs] {
            let path = self.dir.join(&file.file);
            let found = sha256(&path).map_err(|source| AssetError::Read { file: path.clone(), source })?;
            require_same(&path, "sha256", &found, &file.sha256)?;
        }
        Ok(())
    }

    fn check_size(&self, file: &AssetFile) -> Result<(), AssetError> {
        let path = self.dir.join(&file.file);
        let found =
            fs::metadata(&path).map_err(|source| AssetError::Read { file: path.clone(), source })?.len();
        require_same(&path, "size", &found, &file.size)
    }
}

fn places(env: Option<PathBuf>, config: &Config, running_dir: Option<&Path>) -> Vec<PathBuf> {
    if let Some(dir) = env.or_else(|| config.guest_dir.clone()) {
        return vec![dir];
    }
    let built = running_dir.map(|dir| dir.join("../guest"));
    let installed = running_dir.map(|dir| dir.join("../share/vmctr/guest"));
    built.into_iter().chain(installed).chain([PathBuf::from(SYSTEM_DIR)]).collect()
}

fn read_manifest(file: &Path) -> Result<GuestManifest, AssetError> {
    let bytes = fs::read(file).map_err(|source| AssetError::Read { file: file.to_owned(), source })?;
    let manifest: GuestManifest = serde_json::from_slice(&bytes)
        .map_err(|source| AssetError::Manifest { file: file.to_owned(), source })?;
    if manifest.version != MANIFEST_VERSION {
        return Err(AssetError::Version { file: file.to_owned(), found: manifest.version });
    }
    for asset in [&manifest.kernel, &manifest.initramfs] {
        if !is_plain_name(&asset.file) {
            return Err(AssetError::Name { file: file.to_owned(), name: asset.file.clone() });
        }
    }
    Ok(manifest)
}

/// A comma would end a value on QEMU's command line.
fn is_plain_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'+' | b'~');
    !name.is_empty() && name != "." && name != ".." && name.bytes().all(allowed)
}

fn check_kernel(file: &Path) -> Result<(), AssetError> {
    /// `HdrS` stands here in a bzImage. Source: the kernel's Documentation/arch/x86/boot.rst.
    const BZIMAGE_MAGIC: Range<usize> = 0x202..0x206;
    let mut head = Vec::new();
    File::open(file)
        .and_then(|kernel| kernel.take(BZIMAGE_MAGIC.end as u64).read_to_end(&mut head))
        .map_err(|source| AssetError::Read { file: file.to_owned(), source })?;
    if head.starts_with(b"\x7fELF") || head.get(BZIMAGE_MAGIC) == Some(b"HdrS") {
        return Ok(());
    }
    Err(AssetError::NoKernel { file: file.to_owned() })
}

fn require_same<T: fmt::Display + PartialEq>(
    file: &Path,
    property: &'static str,
    found: &T,
    expected: &T,
) -> Result<(), AssetError> {
    if found == expected {
        return Ok(());
    }
    let (found, expected) = (found.to_string(), expected.to_string());
    Err(AssetError::Differs { file: file.to_owned(), property, found, expected })
}

fn sha256(file: &Path) -> io::Result<String> {
    const CHUNK: usize = 128 * 1024;
    let mut file = BufReader::with_capacity(CHUNK, File::open(file)?);
    let mut hasher = Sha256::new();
    loop {
        let chunk = file.fill_buf()?;
        if chunk.is_empty() {
            return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hasher.update(chunk);
        let length = chunk.len();
        file.consume(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asset(file: &str, bytes: &[u8]) -> AssetFile {
        let sha256 = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        AssetFile { file: file.to_owned(), size: bytes.len() as u64, sha256 }
    }

    fn build(kernel: &[u8], change: impl FnOnce(&mut GuestManifest)) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut manifest = GuestManifest {
            version: MANIFEST_VERSION,
            kernel_release: "6.12".into(),
            kernel_source: "test".into(),
            hard_links: true,
            kernel: asset("vmlinux", kernel),
            initramfs: asset("initramfs.cpio", b"cpio"),
            agent_version: "0.1.0".into(),
            modules: vec![],
        };
        change(&mut manifest);
        fs::write(dir.path().join("vmlinux"), kernel).unwrap();
        fs::write(dir.path().join("initramfs.cpio"), b"cpio").unwrap();
        fs::write(dir.path().join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        dir
    }

    fn refusal(kernel: &[u8], change: impl FnOnce(&mut GuestManifest)) -> String {
        GuestAssets::open(build(kernel, change).path()).unwrap_err().to_string()
    }

    #[test]
    fn a_complete_directory_opens() {
        let dir = build(b"\x7fELF kernel", |_| ());
        let assets = GuestAssets::open(dir.path()).unwrap();
        assert!(assets.kernel().ends_with("vmlinux"));
        assets.verify().unwrap();
    }

    #[test]
    fn changed_files_are_refused() {
        assert!(refusal(b"\x7fELF", |manifest| manifest.kernel.size += 1).contains("has size 4"));
        let dir = build(b"\x7fELF", |manifest| manifest.initramfs.sha256 = "00".into());
        let message = GuestAssets::open(dir.path()).unwrap().verify().unwrap_err().to_string();
        assert!(message.contains("initramfs.cpio has sha256"), "{message}");
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        assert!(refusal(b"#!/bin/sh\n", |_| ()).contains("is no kernel"));
        let mut bzimage = vec![0; 0x202];
        bzimage.extend_from_slice(b"HdrS");
        assert!(GuestAssets::open(build(&bzimage, |_| ()).path()).is_ok());
    }

    #[test]
    fn other_versions_and_names_are_refused() {
        assert!(refusal(b"\x7fELF", |manifest| manifest.version = 2).contains("format version 2"));
        for name in ["", "..", "../vmlinux", "/etc/passwd", "a,b"] {
            let message = refusal(b"\x7fELF", |manifest| manifest.initramfs.file = name.into());
            assert!(message.contains("no plain file name"), "{message}");
        }
    }

    #[test]
    fn a_named_directory_is_the_only_place() {
        let config = Config { guest_dir: Some("/config".into()), ..Config::default() };
        assert_eq!(places(Some("/env".into()), &config, None), [PathBuf::from("/env")]);
        assert_eq!(places(None, &config, None), [PathBuf::from("/config")]);
        let found = places(None, &Config::default(), Some(Path::new("/x/target/release")));
        assert_eq!(found[0], Path::new("/x/target/release/../guest"));
        assert_eq!(found.last().unwrap(), Path::new(SYSTEM_DIR));
    }
}
