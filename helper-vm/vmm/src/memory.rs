//! Amounts of guest memory, in whole MiB, as config and annotations write them: `512MiB`, `2GiB`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const MIB: u64 = 1024 * 1024;
const MIB_PER_GIB: u32 = 1024;

/// An amount of memory, at least 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemoryMib(u32);

/// The text or number is no amount of memory.
#[derive(Debug, thiserror::Error)]
#[error(
    "{given:?} is not an amount of memory: write a whole number above 0 with MiB or GiB, such as \"512MiB\""
)]
pub struct MemoryError {
    given: String,
}

impl MemoryMib {
    /// From MiB, for constants.
    ///
    /// # Panics
    /// When `mib` is 0; in a constant that fails the build.
    #[must_use]
    pub const fn new(mib: u32) -> Self {
        assert!(mib > 0, "memory is at least 1 MiB");
        Self(mib)
    }

    /// The smallest amount that holds so many bytes; capped at 4 EiB, which no host has.
    #[must_use]
    pub fn from_bytes_rounded_up(bytes: u64) -> Self {
        Self(u32::try_from(bytes.div_ceil(MIB)).unwrap_or(u32::MAX).max(1))
    }

    /// In MiB.
    #[must_use]
    pub fn mib(self) -> u32 {
        self.0
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0) * MIB
    }

    /// Sum; stays at the largest amount instead of overflowing.
    #[must_use]
    pub fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl FromStr for MemoryMib {
    type Err = MemoryError;

    fn from_str(text: &str) -> Result<Self, MemoryError> {
        parse(text).ok_or_else(|| MemoryError { given: text.to_owned() })
    }
}

fn parse(text: &str) -> Option<MemoryMib> {
    let (number, mib_per_unit) = text
        .strip_suffix("MiB")
        .map(|number| (number, 1))
        .or_else(|| text.strip_suffix("GiB").map(|number| (number, MIB_PER_GIB)))?;
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mib = number.parse::<u32>().ok()?.checked_mul(mib_per_unit)?;
    (mib > 0).then_some(MemoryMib(mib))
}

impl TryFrom<String> for MemoryMib {
    type Error = MemoryError;

    fn try_from(text: String) -> Result<Self, MemoryError> {
        text.parse()
    }
}

impl From<MemoryMib> for String {
    fn from(memory: MemoryMib) -> Self {
        memory.to_string()
    }
}

impl fmt::Display for MemoryMib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}MiB", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_are_binary_and_required() {
        assert_eq!("512MiB".parse::<MemoryMib>().unwrap().mib(), 512);
        assert_eq!("2GiB".parse::<MemoryMib>().unwrap().mib(), 2048);
        for bad in ["", "512", "0MiB", "-1MiB", "+1MiB", "1.5GiB", "512 MiB", "512MB", "4194305GiB", "MiB"] {
            assert!(bad.parse::<MemoryMib>().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn bytes_round_up() {
        assert_eq!(MemoryMib::from_bytes_rounded_up(0).mib(), 1);
        assert_eq!(MemoryMib::from_bytes_rounded_up(MIB).mib(), 1);
        assert_eq!(MemoryMib::from_bytes_rounded_up(MIB + 1).mib(), 2);
        assert_eq!(MemoryMib::from_bytes_rounded_up(u64::MAX).mib(), u32::MAX);
    }

    proptest! {
        #[test]
        fn text_form_round_trips(mib in 1u32..) {
            let memory = MemoryMib::new(mib);
            prop_assert_eq!(memory.to_string().parse::<MemoryMib>().unwrap(), memory);
        }
    }
}
