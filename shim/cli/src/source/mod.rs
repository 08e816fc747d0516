//! Where a container's changes are, and holding it still while they are read.
//!
//! ```text
//!   containerd's record ──> lowers, upper ─┬─ on the host: read as they are
//!                                          └─ in the guest: copied to a folder of our own (spool)
//!   VM's run directory  ──> control socket ──> Hold: frozen and written back until dropped
//! ```
//!
//! Invariant: as long as a [`Source`] is held, nothing but the holder changes its folders.

mod spool;
mod still;

use std::path::PathBuf;

use vmctr_images::root::{RootPlan, Upper};
use vmctr_images::upper::{Consistency, Layers, Namespace, Scope};
use vmctr_vmm::run_dir;

use crate::commands::Context;
use crate::container::Container;
use crate::control::{self, Hold};
use crate::failure::Failure;
use crate::scratch::Scratch;
pub use spool::Archive;
use spool::archive;
pub use still::Still;

/// A container's layers, readable.
pub struct Source {
    /// As containerd records it.
    pub container: Container,
    /// Its folders, topmost first.
    pub folders: Vec<PathBuf>,
    /// What the folders tell.
    pub scope: Scope,
    /// Whether they may change while they are read.
    pub consistency: Consistency,
    /// Its standing still.
    pub still: Still,
    /// Of its shim, if it has a VM.
    socket: Option<PathBuf>,
    /// A copy of the upper that the guest keeps.
    _spool: Option<Scratch>,
}

impl Source {
    /// Makes the container's changes readable: written back and, if `freeze`, standing still.
    pub async fn open(context: &Context, container: Container, freeze: bool) -> Result<Self, Failure> {
        let socket = socket(context, &container.id)?;
        let hold = match &socket {
            Some(socket) => begin(socket, freeze).await?,
            None => None,
        };
        let live = hold.is_some() && !freeze;
        let still = Still::of(hold);
        let (folders, scope, spool) = folders(&container, socket.as_ref()).await?;
        let consistency = if live { Consistency::Live } else { Consistency::Frozen };
        Ok(Self { container, folders, scope, consistency, still, socket, _spool: spool })
    }

    /// Opens its folders.
    pub fn layers(&self) -> Result<Layers, Failure> {
        Ok(Layers::open(&self.folders, Namespace::Trusted)?)
    }

    /// Its root as its processes see it; `None` without a VM.
    pub async fn merged(&self) -> Result<Option<Archive>, Failure> {
        let Some(socket) = &self.socket else { return Ok(None) };
        Ok(control::read_merged(socket).await?.map(archive))
    }
}

/// The socket of the container's shim, if it has a VM.
fn socket(context: &Context, id: &str) -> Result<Option<PathBuf>, Failure> {
    let entries = run_dir::list(&context.run_dir()?)?;
    let ours = |entry: &&run_dir::Entry| {
        entry.meta.owner.namespace == context.namespace && entry.meta.owner.container_id == id
    };
    let entry = entries.iter().find(ours);
    Ok(entry.filter(|entry| !entry.meta.live_processes().is_empty()).map(run_dir::Entry::control_socket))
}

/// A container that ended meanwhile needs no holding.
async fn begin(socket: &std::path::Path, freeze: bool) -> Result<Option<Hold>, Failure> {
    match Hold::begin(socket, freeze).await {
        Ok(hold) => Ok(Some(hold)),
        Err(control::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The folders to read, what they tell, and the copy that one of them may be.
async fn folders(
    container: &Container,
    socket: Option<&PathBuf>,
) -> Result<(Vec<PathBuf>, Scope, Option<Scratch>), Failure> {
    match &container.root {
        RootPlan::Folder { path, .. } => Ok((vec![path.clone()], Scope::Everything, None)),
        RootPlan::Union { lowers, upper } => {
            let mut folders = lowers.clone();
            let spool = match upper {
                Upper::None => return Ok((folders, Scope::Everything, None)),
                Upper::Host { upper, .. } => {
                    folders.insert(0, upper.clone());
                    None
                }
                Upper::Guest => {
                    let socket = socket.ok_or_else(|| gone(&container.id))?;
                    let spool = spool::fetch(socket).await?;
                    folders.insert(0, spool.path().join(spool::UPPER));
                    Some(spool)
                }
            };
            Ok((folders, Scope::Changes, spool))
        }
    }
}

fn gone(id: &str) -> Failure {
    Failure::failed(anyhow::anyhow!(
        "Container {id} kept its changes in its VM's memory (io.vmctr.upper=guest), and the VM has ended"
    ))
}
