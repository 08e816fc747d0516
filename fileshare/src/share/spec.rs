//! What to share: the order that the caller gives the daemon.
//!
//! Invariant: a spec that [`ShareSpec::validate`] passed has absolute paths, counts within bounds and a
//! version that this build knows. Whether the paths exist is for [`super::sources`] to find out, in the
//! daemon.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Format version of [`ShareSpec`].
pub const SPEC_VERSION: u32 = 2;

/// Overlayfs takes at most 500 lower layers (Linux `OVL_MAX_STACK`).
const MAX_LOWERS: usize = 500;

/// More bind mounts than any container has; bounds the mounts that one spec can ask for.
const MAX_VOLUMES: usize = 1024;

/// The contents of one share root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSpec {
    /// [`SPEC_VERSION`].
    pub version: u32,
    /// Whose requests to expect.
    pub used_by: UsedBy,
    /// Folders that appear as `lower/0`, `lower/1`, ... in this order, read-only.
    pub lowers: Vec<PathBuf>,
    /// What lies on top of them.
    pub top: Top,
    /// Folders and files that appear as `vol/0`, `vol/1`, ... in this order.
    pub volumes: Vec<Volume>,
}

/// Who works on the share in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsedBy {
    /// Programs of any kind, which may map files.
    Container,
    /// The server of a union through its overlay: maps no file, and the host keeps what it reads.
    Union,
}

/// Where the container's changes land.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Top {
    /// Nowhere on the host: the guest keeps them, or there is no container root at all.
    None,
    /// In an overlay's upper folder, shared as `upper` and `work`. Both lie on one mount of the host, and
    /// neither inside the other.
    Overlay {
        /// The upper folder.
        upper: PathBuf,
        /// The work folder; empty or left by an earlier overlay of the same upper.
        work: PathBuf,
    },
    /// In a plain folder that is the container's root as it is, shared as `root`. No lowers then.
    Folder {
        /// The folder.
        path: PathBuf,
        /// Refuse writes.
        read_only: bool,
    },
}

/// A folder or a single file of the host that is bind-mounted into a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The folder or file.
    pub source: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
    /// Share what is mounted below the folder as well (`rbind`), not only its own file system (`bind`).
    pub recursive: bool,
}

/// The spec itself is wrong.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Made by another version.
    #[error(
        "share spec has version {0}; this vmctr-fsd speaks version {SPEC_VERSION}: use one build of both"
    )]
    Version(u32),
    /// A path that depends on the working directory.
    #[error("{0} is not an absolute path")]
    NotAbsolute(PathBuf),
    /// Too many of something.
    #[error("{count} {what}; at most {max} are possible")]
    TooMany {
        /// Layers or volumes.
        what: &'static str,
        /// As asked for.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// A plain root folder and layers exclude each other.
    #[error("root folder {0} cannot be combined with lower layers")]
    FolderWithLowers(PathBuf),
}

impl ShareSpec {
    /// A spec that shares nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            version: SPEC_VERSION,
            used_by: UsedBy::Container,
            lowers: Vec::new(),
            top: Top::None,
            volumes: Vec::new(),
        }
    }

    /// Checks all that can be checked without touching the file system.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), SpecError> {
        if self.version != SPEC_VERSION {
            return Err(SpecError::Version(self.version));
        }
        at_most("lower layers", self.lowers.len(), MAX_LOWERS)?;
        at_most("volumes", self.volumes.len(), MAX_VOLUMES)?;
        match &self.top {
            Top::Folder { path, .. } if !self.lowers.is_empty() => {
                return Err(SpecError::FolderWithLowers(path.clone()));
            }
            _ => {}
        }
        match self.paths().find(|path| !path.is_absolute()) {
            Some(path) => Err(SpecError::NotAbsolute(path.to_owned())),
            None => Ok(()),
        }
    }

    fn paths(&self) -> impl Iterator<Item = &Path> {
        let top: Vec<&PathBuf> = match &self.top {
            Top::None => vec![],
            Top::Overlay { upper, work } => vec![upper, work],
            Top::Folder { path, .. } => vec![path],
        };
        let volumes = self.volumes.iter().map(|volume| &volume.source);
        self.lowers.iter().chain(top).chain(volumes).map(PathBuf::as_path)
    }
}

impl Default for ShareSpec {
    fn default() -> Self {
        Self::new()
    }
}

fn at_most(what: &'static str, count: usize, max: usize) -> Result<(), SpecError> {
    if count > max { Err(SpecError::TooMany { what, count, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay() -> ShareSpec {
        ShareSpec {
            lowers: vec!["/l/0".into(), "/l/1".into()],
            top: Top::Overlay { upper: "/s/fs".into(), work: "/s/work".into() },
            volumes: vec![Volume { source: "/etc/hosts".into(), read_only: true, recursive: false }],
            ..ShareSpec::new()
        }
    }

    #[test]
    fn the_wire_form_is_stable() {
        let golden = r#"{"version":2,"used_by":"container","lowers":["/l/0","/l/1"],"top":{"overlay":{"upper":"/s/fs","work":"/s/work"}},"volumes":[{"source":"/etc/hosts","read_only":true,"recursive":false}]}"#;
        assert_eq!(serde_json::to_string(&overlay()).unwrap(), golden);
        assert_eq!(serde_json::from_str::<ShareSpec>(golden).unwrap(), overlay());
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = r#"{"version":2,"used_by":"union","lowers":[],"top":"none","volumes":[],"uid":5}"#;
        assert!(serde_json::from_str::<ShareSpec>(text).is_err());
    }

    #[test]
    fn a_sound_spec_passes() {
        overlay().validate().unwrap();
        ShareSpec::new().validate().unwrap();
    }

    #[test]
    fn every_path_must_be_absolute() {
        let relative = || PathBuf::from("some/where");
        let mut specs = vec![overlay(), overlay(), overlay(), overlay()];
        specs[0].lowers[1] = relative();
        specs[1].volumes[0].source = relative();
        specs[2].top = Top::Overlay { upper: relative(), work: "/w".into() };
        specs[3].top = Top::Overlay { upper: "/u".into(), work: relative() };
        for spec in specs {
            assert!(matches!(spec.validate(), Err(SpecError::NotAbsolute(path)) if path == relative()));
        }
    }

    #[test]
    fn bounds_and_version_hold() {
        let many = ShareSpec { lowers: vec!["/l".into(); MAX_LOWERS + 1], ..ShareSpec::new() };
        assert!(matches!(many.validate(), Err(SpecError::TooMany { count: 501, .. })));
        let old = ShareSpec { version: SPEC_VERSION - 1, ..ShareSpec::new() };
        assert!(matches!(old.validate(), Err(SpecError::Version(1))));
    }

    #[test]
    fn a_folder_root_has_no_lowers() {
        let top = Top::Folder { path: "/r".into(), read_only: false };
        let spec = ShareSpec { top, ..overlay() };
        assert!(matches!(spec.validate(), Err(SpecError::FolderWithLowers(_))));
    }
}
