//! Answers to containerd that are not "done": [`TaskError`] carries the status code that containerd acts on
//! and a message that names the thing, the cause and, where there is one, the way out.

use std::error::Error;

use containerd_shim::protos::ttrpc;

/// Result of a task request.
pub type Result<T> = std::result::Result<T, TaskError>;

/// Why a request was not carried out. The variants are the status codes that containerd's clients tell apart.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No such container or process, or it has exited already.
    #[error("{0}")]
    NotFound(String),
    /// The ID is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request does not fit the state that the process is in.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request, the spec or a mount cannot be carried out by this runtime at all.
    #[error("{0}")]
    InvalidArgument(String),
    /// This runtime does not know the request.
    #[error("{0}")]
    Unimplemented(String),
    /// The shim is about to exit.
    #[error("{0}")]
    Unavailable(String),
    /// Something broke on the way.
    #[error("{0}")]
    Internal(String),
}

impl TaskError {
    /// A failure with all its causes.
    pub fn internal(what: &str, error: &dyn Error) -> Self {
        Self::Internal(format!("{what}: {}", chain(error)))
    }

    /// A refusal of what the user asked for, with all its causes.
    pub fn invalid(error: &dyn Error) -> Self {
        Self::InvalidArgument(chain(error))
    }

    fn code(&self) -> ttrpc::Code {
        match self {
            Self::NotFound(_) => ttrpc::Code::NOT_FOUND,
            Self::AlreadyExists(_) => ttrpc::Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => ttrpc::Code::FAILED_PRECONDITION,
            Self::InvalidArgument(_) => ttrpc::Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => ttrpc::Code::UNIMPLEMENTED,
            Self::Unavailable(_) => ttrpc::Code::UNAVAILABLE,
            Self::Internal(_) => ttrpc::Code::INTERNAL,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

/// The error and its sources on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_sees_the_code_and_the_whole_chain() {
        let cause = "x".parse::<u8>().unwrap_err();
        let error = ttrpc::Error::from(TaskError::internal("Cannot count", &cause));
        let ttrpc::Error::RpcStatus(status) = error else { panic!("no status: {error}") };
        assert_eq!(status.code(), ttrpc::Code::INTERNAL);
        assert_eq!(status.message(), "Cannot count: invalid digit found in string");
    }
}
