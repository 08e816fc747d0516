//! The kernel modules that the agent needs, with all that they depend on, in load order.
//!
//! Which modules a module depends on is read from the module itself: a package that was only unpacked,
//! not installed, has no `modules.dep`. What `modules.builtin` lists is in the kernel already.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

use crate::decompress::{DecompressError, Format};
use crate::elf::{Elf, ElfError};
use crate::overlay;
use crate::signature;

/// Without these a guest cannot run a container: bus, share, union, link to the host.
const REQUIRED: [&str; 4] = ["virtio_pci", "virtiofs", "overlay", "vmw_vsock_virtio_transport"];

/// Taken when there.
const WANTED: [&str; 1] = ["virtio_balloon"];

/// More than any module takes.
const MAX_MODULE: u64 = 64 << 20;

/// The modules cannot be collected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// The list of built-in modules cannot be read.
    #[error("{path} cannot be read; name the directory that `make modules_install` filled for this kernel")]
    Builtin {
        /// The list.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory cannot be listed.
    #[error("The module directory cannot be listed")]
    List(#[from] walkdir::Error),
    /// A module is neither built in nor there as a file.
    #[error("The kernel has no {name}: it is neither built in nor a module in {dir}")]
    Missing {
        /// The module.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A module cannot be read.
    #[error("Module {path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A module cannot be unpacked.
    #[error("Module {path} cannot be unpacked")]
    Unpack {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: DecompressError,
    },
    /// A file is no module.
    #[error("{path} is no kernel module")]
    NoModule {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ElfError,
    },
    /// A module was built for another kernel.
    #[error("Module {path} is for kernel {built_for:?}, not for {release}")]
    OtherKernel {
        /// The file.
        path: PathBuf,
        /// The kernel that it names.
        built_for: String,
        /// The kernel at hand.
        release: String,
    },
    /// Modules depend on each other.
    #[error("Module {0} depends on itself")]
    Cycle(String),
}

/// A module, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// As the kernel calls it: underscores, no `.ko`.
    pub name: String,
    /// The unpacked file, without signature.
    pub image: Vec<u8>,
    /// It is overlayfs, changed so that hard links work on a share.
    pub trusts_names: bool,
}

/// The modules that the agent needs from `dir`, made for kernel `release`, dependencies first.
pub fn collect(dir: &Path, release: &str) -> Result<Vec<Module>, ModuleError> {
    let tree = Tree::open(dir, release)?;
    let mut order = LoadOrder { tree: &tree, begun: BTreeSet::new(), done: Vec::new() };
    for name in REQUIRED {
        order.add(name)?;
    }
    for name in WANTED.into_iter().filter(|name| tree.files.contains_key(*name)) {
        order.add(name)?;
    }
    Ok(order.done)
}

/// A kernel's module directory.
struct Tree<'a> {
    dir: &'a Path,
    release: &'a str,
    builtin: BTreeSet<String>,
    files: BTreeMap<String, PathBuf>,
}

impl<'a> Tree<'a> {
    fn open(dir: &'a Path, release: &'a str) -> Result<Self, ModuleError> {
        let path = dir.join("modules.builtin");
        let list = std::fs::read_to_string(&path).map_err(|source| ModuleError::Builtin { path, source })?;
        let builtin = list.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { dir, release, builtin, files: index(dir)? })
    }

    fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(name)
    }

    fn load(&self, name: &str) -> Result<Loaded, ModuleError> {
        let path = self.files.get(name).ok_or_else(|| self.missing(name))?;
        let image = read(path)?;
        let info =
            Info::parse(&image).map_err(|source| ModuleError::NoModule { path: path.clone(), source })?;
        if info.built_for != self.release {
            return Err(ModuleError::OtherKernel {
                path: path.clone(),
                built_for: info.built_for,
                release: self.release.to_owned(),
            });
        }
        let mut image = signature::strip(&image).to_vec();
        let trusts_names = name == overlay::MODULE
            && overlay::trust_names(&mut image)
                .map_err(|source| ModuleError::NoModule { path: path.clone(), source })?;
        Ok(Loaded { module: Module { name: name.to_owned(), image, trusts_names }, depends: info.depends })
    }

    fn missing(&self, name: &str) -> ModuleError {
        ModuleError::Missing { name: name.to_owned(), dir: self.dir.to_owned() }
    }
}

struct Loaded {
    module: Module,
    depends: Vec<String>,
}

/// Depth-first walk over the dependencies. A module in `begun` but not in `done` is an ancestor.
struct LoadOrder<'a> {
    tree: &'a Tree<'a>,
    begun: BTreeSet<String>,
    done: Vec<Module>,
}

impl LoadOrder<'_> {
    fn add(&mut self, name: &str) -> Result<(), ModuleError> {
        if self.tree.is_builtin(name) || self.done.iter().any(|module| module.name == name) {
            return Ok(());
        }
        if !self.begun.insert(name.to_owned()) {
            return Err(ModuleError::Cycle(name.to_owned()));
        }
        let loaded = self.tree.load(name)?;
        for dependency in &loaded.depends {
            self.add(dependency)?;
        }
        self.done.push(loaded.module);
        Ok(())
    }
}

/// Every module file below `dir/kernel` by name.
fn index(dir: &Path) -> Result<BTreeMap<String, PathBuf>, ModuleError> {
    let mut files = BTreeMap::new();
    for entry in WalkDir::new(dir.join("kernel")).sort_by_file_name() {
        let entry = entry?;
        if let Some(name) = module_name(entry.path()).filter(|_| entry.file_type().is_file()) {
            files.insert(name, entry.into_path());
        }
    }
    Ok(files)
}

/// `kernel/drivers/char/virtio-rng.ko.xz` is module `virtio_rng`; what is no module file has no name.
fn module_name(path: &Path) -> Option<String> {
    let (stem, ending) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(ending, "" | ".gz" | ".xz" | ".zst").then(|| stem.replace('-', "_"))
}

fn read(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let file = std::fs::read(path).map_err(|source| ModuleError::Read { path: path.to_owned(), source })?;
    let Some(format) = Format::detect(&file) else { return Ok(file) };
    format.unpack(&file, MAX_MODULE).map_err(|source| ModuleError::Unpack { path: path.to_owned(), source })
}

/// What a module says of itself in its `.modinfo` section: `key=value`, NUL, `key=value`, NUL, ...
#[derive(Debug, Default, PartialEq, Eq)]
struct Info {
    depends: Vec<String>,
    built_for: String,
}

impl Info {
    fn parse(module: &[u8]) -> Result<Self, ElfError> {
        let section = Elf::parse(module)?.section(".modinfo")?.unwrap_or_default();
        Ok(Self::from_section(section))
    }

    fn from_section(section: &[u8]) -> Self {
        let mut info = Self::default();
        for entry in section.split(|&byte| byte == 0) {
            let text = String::from_utf8_lossy(entry);
            match text.split_once('=') {
                Some(("depends", names)) => info.depends = split_names(names),
                Some(("vermagic", magic)) => {
                    info.built_for = magic.split_whitespace().next().unwrap_or_default().to_owned();
                }
                _ => {}
            }
        }
        info
    }
}

fn split_names(names: &str) -> Vec<String> {
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests;
