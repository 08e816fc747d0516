//! What the background process is told to mount, and what `mount.json` says of it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::check::Plan;
use super::target::Target;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// A union of folders, by a VM of its own.
    Union(Plan),
    /// The root of a container that runs.
    Container(Target),
}

impl Order {
    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        match self {
            Self::Union(plan) => &plan.mountpoint,
            Self::Container(target) => &target.mountpoint,
        }
    }

    /// The folders on this host that nobody else may change.
    pub fn folders(&self) -> (&[PathBuf], Vec<&PathBuf>) {
        match self {
            Self::Union(plan) => {
                (&plan.lowers, plan.top.iter().flat_map(|top| [&top.upper, &top.work]).collect())
            }
            Self::Container(_) => (&[], vec![]),
        }
    }
}
