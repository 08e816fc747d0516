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

use std::path::PathBuf;
use std::time::Instant;

use containerd_client::Client;
use tempfile::TempDir;
use vmctr_images::root::{RootPlan, Upper};
use vmctr_images::upper::{Consistency, Layers, Namespace, Scope};
use vmctr_vmm::run_dir;

use crate::commands::Context;
use crate::container::{self, Container};
use crate::control::{self, Hold};
use crate::failure::Failure;

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
    /// Since when it stands still, if it does.
    pub held_since: Option<Instant>,
    hold: Option<Hold>,
    /// A copy of the upper that the guest keeps.
    _spool: Option<TempDir>,
}

impl Source {
    /// Finds the container and makes its changes readable: written back and, if `freeze`, standing still.
    pub async fn open(context: &Context, client: &Client, id: &str, freeze: bool) -> Result<Self, Failure> {
        let container = container::find(context, client, id).await?;
        let socket = socket(context, id)?;
        let begun = Instant::now();
        let hold = match &socket {
            Some(socket) => begin(socket, freeze).await?,
            None => None,
        };
        let (folders, scope, spool) = folders(&container, socket).await?;
        let live = hold.is_some() && !freeze;
        Ok(Self {
            container,
            folders,
            scope,
            consistency: if live { Consistency::Live } else { Consistency::Frozen },
            held_since: (hold.is_some() && freeze).then_some(begun),
            hold,
            _spool: spool,
        })
    }

    /// Opens its folders.
    pub fn layers(&self) -> Result<Layers, Failure> {
        Ok(Layers::open(&self.folders, Namespace::Trusted)?)
    }

    /// Lets the container run on. Fails if it did so before.
    pub fn release(&mut self) -> Result<(), Failure> {
        match self.hold.take() {
            Some(hold) => Ok(hold.release()?),
            None => Ok(()),
        }
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
    socket: Option<PathBuf>,
) -> Result<(Vec<PathBuf>, Scope, Option<TempDir>), Failure> {
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
                    let spool = spool::fetch(&socket).await?;
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
