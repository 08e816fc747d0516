//! INIT: what this mount can do is what kernel, guest and configuration all allow.

use crate::export::wire::abi::{InHeader, MAX_DATA, OUT_HEADER, OutHeader, feature, op};
use crate::export::wire::codec::{Malformed, Put, Take};
use rustix::mount::MountAttrFlags;

use super::config::{Cache, Config, Writes};

/// The protocol that we speak.
const MAJOR: u32 = 7;
const MINOR: u32 = 40;

/// The oldest kernel that can: clearing of set-ID bits by the server, longer SETXATTR (Linux 5.13).
const OLDEST_MINOR: u32 = 33;

/// Without these nothing is right.
const NEEDED: u64 = feature::ATOMIC_O_TRUNC
    | feature::BIG_WRITES
    | feature::DO_READDIRPLUS
    | feature::MAX_PAGES
    | feature::HANDLE_KILLPRIV_V2
    | feature::SETXATTR_EXT
    | feature::POSIX_LOCKS
    | feature::FLOCK_LOCKS;

/// ACLs need both parts: with them, the server applies the umask.
const ACL: u64 = feature::POSIX_ACL | feature::DONT_MASK;

/// What we make use of when it is there.
const WANTED: u64 = NEEDED
    | ACL
    | feature::ASYNC_READ
    | feature::ASYNC_DIO
    | feature::PARALLEL_DIROPS
    | feature::ABORT_ERROR
    | feature::INIT_EXT
    | feature::CREATE_SUPP_GROUP;

/// The kernel's first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    unique: u64,
    minor: u32,
    read_ahead: u32,
    features: u64,
}

/// Kernel and guest have too little in common.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InitError {
    /// Not the request that a mount begins with.
    #[error("The kernel's first request is no INIT")]
    Malformed(#[source] Malformed),
    /// Too old a kernel.
    #[error("The kernel speaks FUSE {MAJOR}.{0}; exports need {MAJOR}.{OLDEST_MINOR}, which is Linux 5.13")]
    Old(u32),
    /// A feature is missing on one side.
    #[error("The {side} lacks FUSE features {missing:#x}, which exports need")]
    Missing {
        /// Kernel or guest.
        side: &'static str,
        /// The INIT flags.
        missing: u64,
    },
}

/// What host and configuration ask of the guest in the hello.
pub(super) fn asked(config: &Config) -> u64 {
    let cache = match config.cache {
        Cache::Alone => feature::CACHE_SYMLINKS,
        Cache::For(_) => feature::AUTO_INVAL_DATA,
    };
    let writes = match config.writes {
        Writes::Through => 0,
        Writes::Gathered => feature::WRITEBACK_CACHE,
    };
    let lend = if config.upper.is_some() { feature::LEND } else { 0 };
    WANTED | cache | writes | lend
}

/// What is asked of the kernel only.
pub(super) fn of_kernel(config: &Config) -> u64 {
    let read_only = config.restrictions.contains(MountAttrFlags::MOUNT_ATTR_RDONLY);
    let fixed = config.cache == Cache::Alone && config.upper.is_none() && read_only;
    if fixed && !config.layers.is_empty() { feature::PASSTHROUGH } else { 0 }
}

impl Offer {
    pub(super) fn parse(message: &[u8]) -> Result<Self, InitError> {
        let offer = Self::take(message).map_err(InitError::Malformed)?;
        if offer.minor < OLDEST_MINOR { Err(InitError::Old(offer.minor)) } else { Ok(offer) }
    }

    fn take(message: &[u8]) -> Result<Self, Malformed> {
        let mut take = Take::new(message);
        let header = InHeader::take(&mut take)?;
        let (major, minor) = (take.u32()?, take.u32()?);
        if header.opcode != op::INIT || major != MAJOR {
            return Err(Malformed("not INIT of protocol 7"));
        }
        let (read_ahead, low) = (take.u32()?, take.u32()?);
        let high = if u64::from(low) & feature::INIT_EXT != 0 { take.u32()? } else { 0 };
        let features = u64::from(low) | u64::from(high) << 32;
        Ok(Self { unique: header.unique, minor, read_ahead, features })
    }

    /// What all sides do, of what the guest agreed to in the hello.
    pub(super) fn agree(&self, guest: u64) -> Result<u64, InitError> {
        for (side, has) in [("kernel", self.features), ("guest", guest)] {
            let missing = NEEDED & !has;
            if missing != 0 {
                return Err(InitError::Missing { side, missing });
            }
        }
        let both = self.features & guest;
        Ok(if both & ACL == ACL { both } else { both & !ACL })
    }

    /// What of these the kernel can do: it alone has to.
    pub(super) fn has(&self, features: u64) -> u64 {
        self.features & features
    }

    /// The answer.
    pub(super) fn answer(&self, features: u64) -> Vec<u8> {
        const BACKGROUND: u16 = 64;
        const LENGTH: u32 = 64;
        let mut message = Vec::new();
        OutHeader { len: OUT_HEADER as u32 + LENGTH, error: 0, unique: self.unique }.put(&mut message);
        message.u32(MAJOR).u32(self.minor.min(MINOR)).u32(self.read_ahead.max(MAX_DATA)).u32(features as u32);
        message.u16(BACKGROUND).u16(BACKGROUND * 3 / 4).u32(MAX_DATA);
        // Times to the nanosecond; as many pages as the data fills; no mapping.
        message.u32(1).u16((MAX_DATA / 4096) as u16).u16(0).u32((features >> 32) as u32);
        // How deep layers may be stacked that the kernel reads by itself: not at all.
        let depth = u32::from(features & feature::PASSTHROUGH != 0);
        message.u32(depth).bytes(&[0; 24]);
        message
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::export::wire::abi::IN_HEADER;

    fn offer(features: u64) -> Vec<u8> {
        let mut message = Vec::new();
        InHeader { len: (IN_HEADER + 64) as u32, opcode: op::INIT, unique: 2, ..InHeader::default() }
            .put(&mut message);
        message.u32(7).u32(45).u32(131_072).u32(features as u32).u32((features >> 32) as u32);
        message.bytes(&[0; 44]);
        message
    }

    #[test]
    fn only_what_all_have_is_used() {
        let config = Config::new("/mnt".into());
        let kernel = Offer::parse(&offer(!feature::CREATE_SUPP_GROUP)).unwrap();
        let agreed = kernel.agree(asked(&config)).unwrap();
        assert_eq!(agreed & feature::CREATE_SUPP_GROUP, 0);
        assert_eq!(agreed & feature::WRITEBACK_CACHE, 0, "nobody asked for it");
        assert_ne!(agreed & feature::CACHE_SYMLINKS, 0);
        assert_eq!(kernel.answer(agreed).len(), OUT_HEADER + 64);
    }

    #[test]
    fn acls_come_whole_or_not_at_all() {
        let kernel = Offer::parse(&offer(!feature::DONT_MASK)).unwrap();
        assert_eq!(kernel.agree(u64::MAX).unwrap() & ACL, 0);
    }

    #[test]
    fn a_lack_is_named() {
        let kernel = Offer::parse(&offer(u64::MAX)).unwrap();
        let lacks = kernel.agree(!feature::POSIX_LOCKS);
        assert_eq!(lacks, Err(InitError::Missing { side: "guest", missing: feature::POSIX_LOCKS }));
        let mut old = offer(u64::MAX);
        old[44] = 31;
        assert_eq!(Offer::parse(&old), Err(InitError::Old(31)));
        assert!(Offer::parse(&old[..50]).is_err());
    }

    #[test]
    fn what_others_change_is_not_kept() {
        let config = Config { cache: Cache::For(Duration::from_secs(1)), ..Config::new("/mnt".into()) };
        assert_eq!(asked(&config) & feature::CACHE_SYMLINKS, 0);
        assert_ne!(asked(&config) & feature::AUTO_INVAL_DATA, 0);
    }
}
