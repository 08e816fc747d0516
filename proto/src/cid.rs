//! vsock context IDs.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A guest's vsock context ID: never one of the reserved 0 (hypervisor), 1 (local), 2 (host) or `u32::MAX`
/// (any). Source: vsock(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct GuestCid(u32);

/// The number is a reserved context ID.
#[derive(Debug, thiserror::Error)]
#[error("vsock CID {0} is reserved; guests use 3 to 4294967294")]
pub struct CidError(u32);

impl GuestCid {
    /// The CID that each VM gets: VMs do not see each other, so one number serves all.
    pub const DEFAULT: Self = Self(3);
}

impl TryFrom<u32> for GuestCid {
    type Error = CidError;

    fn try_from(cid: u32) -> Result<Self, CidError> {
        if (3..u32::MAX).contains(&cid) { Ok(Self(cid)) } else { Err(CidError(cid)) }
    }
}

impl From<GuestCid> for u32 {
    fn from(cid: GuestCid) -> Self {
        cid.0
    }
}

impl fmt::Display for GuestCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_cids_are_refused() {
        for cid in [0, 1, 2, u32::MAX] {
            assert!(GuestCid::try_from(cid).is_err());
        }
        assert_eq!(u32::from(GuestCid::try_from(3).unwrap()), 3);
    }
}
