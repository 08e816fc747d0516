//! What makes a VM itself, although it may be one of many that were restored from the same memory: random
//! numbers and the clock. Both come with `Hello`, before any process of a container runs.

use std::io;

use rustix::time::{ClockId, Timespec, clock_settime};
use tonic::Status;
use vmctr_proto::SEED_BYTES;

use crate::sys;

/// The guest cannot become itself.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Too little to be safe.
    #[error("the seed has {0} bytes, not {SEED_BYTES}")]
    Seed(usize),
    /// The kernel refuses.
    #[error("cannot {action}: {source}")]
    Kernel {
        action: &'static str,
        #[source]
        source: io::Error,
    },
}

impl IdentityError {
    /// For the host.
    pub fn to_status(&self) -> Status {
        match self {
            Self::Seed(_) => Status::invalid_argument(self.to_string()),
            Self::Kernel { .. } => Status::internal(self.to_string()),
        }
    }
}

/// Reseeds the kernel's generator, so that whoever asks it from now on gets numbers of this VM's own, and
/// sets the wall clock.
pub fn assume(seed: &[u8], wall_clock_ns: u64) -> Result<(), IdentityError> {
    let length = seed.len();
    let seed: &[u8; SEED_BYTES] = seed.try_into().map_err(|_| IdentityError::Seed(length))?;
    let failed = |action| move |source| IdentityError::Kernel { action, source };
    sys::reseed(seed).map_err(failed("reseed the random number generator"))?;
    set_clock(wall_clock_ns).map_err(failed("set the clock"))
}

fn set_clock(nanoseconds: u64) -> io::Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let tv_sec = i64::try_from(nanoseconds / SECOND).map_err(io::Error::other)?;
    let tv_nsec = i64::try_from(nanoseconds % SECOND).map_err(io::Error::other)?;
    Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_that_is_too_short_is_refused_before_anything_changes() {
        for length in [0, SEED_BYTES - 1, SEED_BYTES + 1] {
            let error = assume(&vec![1; length], 0).unwrap_err();
            assert_eq!(error.to_string(), format!("the seed has {length} bytes, not 32"));
        }
    }
}
