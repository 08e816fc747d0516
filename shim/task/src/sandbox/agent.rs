//! Calls to the guest's agent, each with a time limit and called off when the VM ends.
//!
//! The agent may answer anything or nothing: its errors become ours with their text cut and cleaned.

use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Code, Response, Status};
use vmctr_vmm::vm::Agent;

use crate::error::TaskError;

/// Of what the guest says, this much is passed on.
const MAX_TEXT: usize = 1024;

/// Why the VM or what it needs has ended; `None` while all is well. The first reason stays.
#[derive(Clone, Debug)]
pub struct EndSignal(watch::Sender<Option<String>>);

impl EndSignal {
    /// Nothing has ended yet.
    pub fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Something has ended.
    pub fn set(&self, reason: String) {
        self.0.send_if_modified(|first| {
            let news = first.is_none();
            if news {
                *first = Some(reason);
            }
            news
        });
    }

    /// Waits for the end and says why it came.
    pub async fn wait(&self) -> String {
        let mut end = self.0.subscribe();
        let reason = end.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }
}

/// A call did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent refused or failed.
    #[error("{0}")]
    Refused(TaskError),
    /// The agent did not answer.
    #[error("The guest did not {what} within {} s", limit.as_secs())]
    Timeout {
        /// The call, as a verb.
        what: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The VM ended meanwhile.
    #[error("The VM has ended: {0}")]
    Ended(String),
}

impl From<CallError> for TaskError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(error) => error,
            other => Self::Internal(other.to_string()),
        }
    }
}

/// The agent's client and what calls it off.
#[derive(Clone, Debug)]
pub struct AgentLink {
    agent: Agent,
    end: EndSignal,
}

impl AgentLink {
    /// Calls through `agent` until `end`.
    pub fn new(agent: Agent, end: EndSignal) -> Self {
        Self { agent, end }
    }

    /// Makes one call. `what` completes "The guest did not ...".
    pub async fn call<T, F>(
        &self,
        what: &'static str,
        limit: Duration,
        make: impl FnOnce(Agent) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        tokio::select! {
            answer = timeout(limit, make(self.agent.clone())) => match answer {
                Ok(Ok(reply)) => Ok(reply.into_inner()),
                Ok(Err(status)) => Err(self.failed(what, &status).await),
                Err(_) => Err(CallError::Timeout { what, limit }),
            },
            reason = self.end.wait() => Err(CallError::Ended(reason)),
        }
    }

    /// A broken connection is mostly the first sign of the VM's end, whose reason tells more.
    async fn failed(&self, what: &'static str, status: &Status) -> CallError {
        const GRACE: Duration = Duration::from_millis(1500);
        let broken = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
        if broken && let Ok(reason) = timeout(GRACE, self.end.wait()).await {
            return CallError::Ended(reason);
        }
        CallError::Refused(task_error(what, status))
    }
}

fn task_error(what: &str, status: &Status) -> TaskError {
    let text = clean(status.message());
    match status.code() {
        Code::NotFound => TaskError::NotFound(text),
        Code::AlreadyExists => TaskError::AlreadyExists(text),
        Code::FailedPrecondition => TaskError::FailedPrecondition(text),
        Code::InvalidArgument => TaskError::InvalidArgument(text),
        Code::Unimplemented => TaskError::Unimplemented(text),
        code => TaskError::Internal(format!("The guest did not {what}: {text} ({code:?})")),
    }
}

/// Text of the guest's, fit for logs and terminals.
pub fn clean(text: &str) -> String {
    text.chars().take(MAX_TEXT).map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_stays() {
        let end = EndSignal::new();
        end.set("first".into());
        end.set("second".into());
        assert_eq!(end.wait().await, "first");
    }

    #[test]
    fn the_guests_words_are_cut_and_cleaned() {
        let hostile = format!("\x1b[2J{}", "x".repeat(10_000));
        let status = Status::invalid_argument(hostile);
        let TaskError::InvalidArgument(text) = task_error("start", &status) else { panic!("wrong code") };
        assert_eq!(text.chars().count(), MAX_TEXT);
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn codes_that_containerd_tells_apart_stay_apart() {
        assert!(matches!(task_error("x", &Status::not_found("")), TaskError::NotFound(_)));
        assert!(matches!(
            task_error("x", &Status::failed_precondition("")),
            TaskError::FailedPrecondition(_)
        ));
        let internal = task_error("start the process", &Status::internal("no memory"));
        assert_eq!(internal.to_string(), "The guest did not start the process: no memory (Internal)");
    }
}
