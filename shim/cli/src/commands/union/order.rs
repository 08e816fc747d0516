//! What a background process is told to mount, what `mount.json` says of it, and what the process answers.
//!
//! ```text
//!   vmctr union mount ── order ──> stdin of a new process                    <── ready | failed ── its stdout
//!                     ── order ──> socket of the owner of a VM    <── declined
//!                                                                 <── taken, then ready | failed
//! ```
//!
//! An order is JSON up to the end of what is sent, an answer a line of JSON. Both are bounded. An owner that is going
//! closes the connection, which means that it declines.

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};

use super::check::Plan;
use super::target::Target;

/// Far above 500 lower folders with the longest names.
pub const MAX_ORDER: u64 = 4 << 20;

/// A process says no more than this at once.
const MAX_ANSWER: u64 = 64 << 10;

/// The version of a format: what says another one is not understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Version<const THIS: u32>;

impl<const THIS: u32> TryFrom<u32> for Version<THIS> {
    type Error = String;

    fn try_from(version: u32) -> Result<Self, String> {
        if version == THIS { Ok(Self) } else { Err(format!("format version {version} is not {THIS}")) }
    }
}

impl<const THIS: u32> From<Version<THIS>> for u32 {
    fn from(_: Version<THIS>) -> Self {
        THIS
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// A union of folders.
    Union(Plan),
    /// The root of a container that runs.
    Container(Target),
}

/// What the process says to an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It will be tried.
    Taken,
    /// This VM cannot take it.
    Declined,
    /// The mount is usable.
    Ready,
    /// It is not, and nothing is left.
    Failed(String),
}

impl Answer {
    /// As it is sent.
    pub fn to_line(&self) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }

    /// The next one; none when the other side has closed.
    pub fn read(from: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut line = Vec::new();
        from.take(MAX_ANSWER).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&line)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_answer() -> impl Strategy<Value = Answer> {
        prop_oneof![
            Just(Answer::Taken),
            Just(Answer::Declined),
            Just(Answer::Ready),
            any::<String>().prop_map(Answer::Failed),
        ]
    }

    #[test]
    fn a_format_of_another_version_is_refused() {
        assert_eq!(serde_json::to_string(&Version::<2>).unwrap(), "2");
        assert_eq!(serde_json::from_str::<Version<2>>("2").unwrap(), Version);
        let error = serde_json::from_str::<Version<2>>("3").unwrap_err().to_string();
        assert!(error.contains("format version 3 is not 2"), "{error}");
    }

    #[test]
    fn an_endless_answer_is_none() {
        let endless = vec![b'x'; 1 << 20];
        assert!(Answer::read(&mut endless.as_slice()).is_err());
        assert!(Answer::read(&mut &b"{\"fine\":1}\n"[..]).is_err());
    }

    proptest! {
        #[test]
        fn answers_arrive_one_by_one(answers in prop::collection::vec(any_answer(), 0..5)) {
            let sent: Vec<u8> = answers.iter().flat_map(|answer| answer.to_line().unwrap()).collect();
            let mut sent = sent.as_slice();
            for answer in answers {
                prop_assert_eq!(Answer::read(&mut sent).unwrap(), Some(answer));
            }
            prop_assert_eq!(Answer::read(&mut sent).unwrap(), None);
        }

        #[test]
        fn whatever_is_sent_is_an_answer_or_an_error(bytes: Vec<u8>) {
            let _ = Answer::read(&mut bytes.as_slice());
        }
    }
}
