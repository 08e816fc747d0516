//! One file per call of the protocol: its steps, in order.
//!
//! A verb waits (for streams, helpers, the kernel) outside the actor and changes state only by short
//! closures inside it. It runs to its end even when the host stops waiting for the answer.

mod create;
mod delete;
mod exec;
mod export;
mod freeze;
mod inspect;
mod rehearse;
mod share;
mod signal;
mod start;
mod terminal;
mod union;
mod update;
mod upper;

use std::error::Error as _;
use std::io;

use tonic::{Code, Status};
use vmctr_fileshare::export::guest::StillMoving;

use crate::guest::{AdoptError, HelperError, LookupError, WatchError, WrongState};
use crate::{archive, cgroup, exports, ids, rootfs, spec, stdio, unions};

pub use create::create;
pub use delete::delete;
pub use exec::register;
pub use export::export_container;
pub use freeze::{freeze, thaw};
pub use inspect::{pids, stats};
pub use rehearse::rehearse;
pub use share::{flush, mount_share};
pub use signal::signal;
pub use start::start;
pub use terminal::resize;
pub use union::{add_union, flush_union, remove_union};
pub use update::update;
pub use upper::{UpperSender, read_merged, read_upper};

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Name(#[from] ids::NameError),
    #[error(transparent)]
    Lookup(#[from] LookupError),
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Root(#[from] rootfs::PlanError),
    #[error(transparent)]
    Stream(#[from] stdio::Error),
    #[error(transparent)]
    Helper(#[from] HelperError),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Remove(#[from] rootfs::Error),
    #[error("{what} cannot be {verb}")]
    State { what: String, verb: &'static str, source: WrongState },
    #[error("{what} cannot be {verb}: {why}")]
    Busy { what: String, verb: &'static str, why: &'static str },
    #[error("{0}")]
    Argument(String),
    #[error("{0}")]
    Io(String, #[source] io::Error),
    #[error(transparent)]
    Archive(#[from] archive::Error),
    #[error(transparent)]
    Watch(#[from] WatchError),
    #[error(transparent)]
    Export(#[from] exports::Error),
    #[error(transparent)]
    Union(#[from] unions::Error),
    #[error(transparent)]
    Still(#[from] StillMoving),
    #[error("marking the container as running")]
    Mark(#[source] libcontainer::error::LibcontainerError),
}

type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::Lookup(LookupError::Missing(_)) => Code::NotFound,
            Self::Lookup(LookupError::Exists(_)) | Self::Union(unions::Error::Exists(_)) => {
                Code::AlreadyExists
            }
            Self::Name(_) | Self::Spec(_) | Self::Root(_) | Self::Argument(_) => Code::InvalidArgument,
            Self::Helper(HelperError::Program(_)) => Code::InvalidArgument,
            Self::State { .. } | Self::Busy { .. } | Self::Still(_) | Self::Union(unions::Error::Used(_)) => {
                Code::FailedPrecondition
            }
            Self::Stream(_) => Code::Unavailable,
            _ => Code::Internal,
        }
    }

    /// The failure as the host sees it: the whole chain of causes.
    pub fn to_status(&self) -> Status {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let named = error.to_string();
            // Some libraries repeat their cause in their own text.
            if !text.contains(&named) {
                text = format!("{text}: {named}");
            }
            cause = error.source();
        }
        Status::new(self.code(), text)
    }
}

impl From<AdoptError> for Error {
    fn from(error: AdoptError) -> Self {
        match error {
            AdoptError::Lookup(error) => Self::Lookup(error),
            AdoptError::State(source) => {
                Self::State { what: "the process".to_owned(), verb: "taken over", source }
            }
        }
    }
}

/// Names what was done when an input or output operation failed.
fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |error| Error::Io(what, error)
}

/// Runs something that may block on the share or the kernel beside the actor.
async fn blocking<T: Send + 'static>(job: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(job).await {
        Ok(result) => result,
        Err(error) => Err(Error::Io("a worker thread".to_owned(), io::Error::other(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ContainerId, ProcessId};

    #[test]
    fn statuses_tell_the_whole_chain() {
        let error = Error::Io("opening /x".to_owned(), io::Error::other("no such thing"));
        assert_eq!(error.to_status().message(), "opening /x: no such thing");
        let id = ProcessId::init(&ContainerId::parse("web").unwrap());
        let missing = Error::from(LookupError::Missing(id)).to_status();
        assert_eq!((missing.code(), missing.message()), (Code::NotFound, "container web does not exist"));
    }
}
