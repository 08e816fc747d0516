//! Templates: VMs that were booted once, saved where their agent waits for its devices, and from which others
//! go on.
//!
//! ```text
//!   TEMPLATE_DIR/             config `template_dir`, 0700
//!     KEY/                    first 16 hex digits of the key: see `key`
//!       manifest              what it is, its parts' digests; see `manifest`
//!       state                 the devices, as QEMU writes them
//!       ram                   the guest's memory without what is zero; see `ram`
//!     KEY.lock                held by whoever makes or removes KEY, freed by the kernel however that ends
//!     KEY.new/                what a maker fills; the next holder of the lock removes what a killed one left, or
//!                             after a day any maker, as the host's next boot has other keys
//!     KEY.log                 what the last maker in the background had to say
//!     run/                    run directories of VMs that become templates
//! ```
//!
//! Invariants: a directory KEY is complete and works, as it got its name after its files were written and synced,
//! and after a VM was restored from them. A
//! template is used only if its key, the sizes and digests of all its parts fit; the memory's are checked
//! while it is copied. A template serves one host boot, one QEMU, one guest, one shape of the machine: all
//! that is in the key, so what does not fit is not found.

mod key;
mod make;
mod manifest;
mod ram;
mod store;

use std::io;
use std::path::PathBuf;

pub use key::Key;
pub use make::{Maker, make, make_or_wait};
pub use store::{Entry, Store, Template};

use crate::qmp::QmpError;
use crate::run_dir::RunDirError;
use crate::vm::VmError;

/// A template cannot be used, made or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file cannot be used.
    #[error("Cannot {action} {}", path.display())]
    Io {
        /// "read", "write", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A part is not what was written.
    #[error("The template {} is damaged: {what}", path.display())]
    Damaged {
        /// Its directory or file.
        path: PathBuf,
        /// In words.
        what: String,
    },
    /// Another process makes the same template.
    #[error("Another process is making the template {0}")]
    Busy(Key),
    /// The VM to be saved did not come up.
    #[error("Cannot boot the VM that is to be the template")]
    Vm(#[from] VmError),
    /// What was saved is of no use.
    #[error("Cannot restore a VM from the new template")]
    Proof(#[source] Box<VmError>),
    /// QEMU did not save it.
    #[error("Cannot save the VM")]
    Save(#[source] QmpError),
    /// The maker's run directory.
    #[error("Cannot record the VM that is to be the template")]
    RunDir(#[from] RunDirError),
    /// A thread of ours is gone.
    #[error("A thread that reads or writes a template is gone")]
    Thread(#[source] io::Error),
}

impl TemplateError {
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    fn damaged(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), what: what.into() }
    }
}
