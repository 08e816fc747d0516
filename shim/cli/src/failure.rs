//! How the program fails: which exit code, which message, which advice.
//!
//! A failure prints as one line with its whole chain of causes, then, where there is one, a hint:
//!
//! ```text
//!   vmctr: Cannot reach containerd at /run/x.sock: connection refused
//!   hint: start it, or name its socket with -a
//! ```

use std::fmt;
use std::process::ExitCode;

/// What the program's exit code says. Success is not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The work is done and the answer is bad.
    Bad,
    /// The work could not be done.
    Failed,
    /// It was asked for wrongly, or by who may not.
    Usage,
    /// What the command names does not exist.
    NotFound,
    /// A signal asked for the end.
    Interrupted,
}

impl Exit {
    fn code(self) -> u8 {
        match self {
            Self::Bad => 1,
            Self::Failed | Self::Usage => 125,
            Self::NotFound => 127,
            Self::Interrupted => 130,
        }
    }

    /// As mount(8) has its exit codes, and passes on those of its helpers.
    pub fn for_mount(self) -> ExitCode {
        const INCORRECT: u8 = 1;
        const FAILED: u8 = 32;
        ExitCode::from(if self == Self::Usage { INCORRECT } else { FAILED })
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An error, the exit code that it means and what the user can do about it.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    error: anyhow::Error,
    hint: Option<String>,
}

/// What every verb returns: whether its answer is good.
pub type Outcome = Result<Verdict, Failure>;

/// The answer of a verb that did its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Exit code 0.
    Good,
    /// Exit code 1; the verb has printed why.
    Bad,
}

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Good => Self::SUCCESS,
            Verdict::Bad => Exit::Bad.into(),
        }
    }
}

impl Failure {
    /// The thing that the command names does not exist.
    pub fn not_found(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::NotFound, error: error.into(), hint: None }
    }

    /// The work could not be done.
    pub fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Failed, error: error.into(), hint: None }
    }

    /// It was asked for wrongly, or by who may not.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self { exit: Exit::Usage, error: error.into(), hint: None }
    }

    /// Means another exit code.
    #[must_use]
    pub fn with(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        self.exit
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::failed(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmctr: {}", one_line(&self.error))?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

/// An error and its causes on one line, each said once: some libraries repeat the cause in their own text.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| cause.to_string().replace('\n', " ")) {
        if line.is_empty() {
            line = cause;
        } else if !line.ends_with(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn the_whole_chain_and_the_hint_are_printed() {
        let error = anyhow!("no such file").context("cannot read /x").context("no guest assets");
        let failure = Failure::not_found(error).hint("build them");
        assert_eq!(
            failure.to_string(),
            "vmctr: no guest assets: cannot read /x: no such file\nhint: build them"
        );
        assert_eq!(failure.exit(), Exit::NotFound);
    }

    #[test]
    fn a_repeated_cause_and_line_breaks_are_dropped() {
        let error = anyhow!("a\nb").context("failed: a b");
        assert_eq!(one_line(&error), "failed: a b");
    }

    #[test]
    fn a_plain_error_is_our_own_failure() {
        assert_eq!(Failure::from(anyhow!("x")).exit(), Exit::Failed);
    }
}
