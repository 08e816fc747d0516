//! How each of the passthrough file systems is set up: where it is rooted, what the guest may remember, which
//! extended attributes pass.
//!
//! | | layers, root | upper, work | volumes |
//! |---|---|---|---|
//! | names and attributes | kept for a day | likewise | asked for each time |
//! | file contents | kept between opens | likewise; a union's not kept | dropped at open, and when size or time changed |
//! | listings | kept | likewise | read each time |
//!
//! What a union's guest would keep of upper files, the host has kept already. A write that bypasses the guest's page
//! cache costs no copy, and no question for the capabilities that the write takes away: the overlay has asked.
//!
//! Extended attributes that pass, both ways: `user.*`, `trusted.overlay.*` (the overlay's marks),
//! `security.capability` and POSIX ACLs. Others are hidden when listed and refused with ENOTSUP: the daemon's
//! CAP_SYS_ADMIN would otherwise let the guest set what only the host's own tools should (`security.ima`,
//! `security.selinux`, any other `trusted.*`).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode};

use crate::share::UsedBy;

/// "Without limit", in a form that the protocol can carry.
pub(super) const FOREVER: Duration = Duration::from_secs(86_400);

/// `:type:scope:name from the guest:name from the host:`, first match wins.
const XATTR_RULES: &str = "\
    :ok:all:user.:user.: \
    :ok:all:trusted.overlay.:trusted.overlay.: \
    :ok:all:security.capability:security.capability: \
    :ok:all:system.posix_acl_:system.posix_acl_: \
    :unsupported:all:::";

/// Where the parts of a share root are, as this process sees them.
#[derive(Debug)]
pub struct Places {
    /// The folder that the guest sees as the root of the mount.
    pub share: PathBuf,
    /// The folder that holds upper and work, when they are shared.
    pub top: Option<TopPlaces>,
    /// The folder that holds the volumes, when there are any.
    pub volumes: Option<PathBuf>,
}

/// Upper and work below one folder.
#[derive(Debug)]
pub struct TopPlaces {
    /// The folder, never shown to the guest.
    pub parent: PathBuf,
    /// Upper, relative to it.
    pub upper: PathBuf,
    /// Work, relative to it.
    pub work: PathBuf,
}

/// What the daemon found out before it knew the guest.
#[derive(Debug)]
pub struct Limits {
    /// Whose requests to expect.
    pub used_by: UsedBy,
    /// Descriptors that the guest may make the daemon hold in each part (layers, upper and work, volumes). The
    /// process's own limit bounds their sum; a guest at either limit gets ENFILE or EMFILE.
    pub guest_fds: u64,
    /// Whether layers and top lie on one file system of the host. If not, each layer gets a device number of
    /// its own in the guest, so that equal inode numbers do not look like hard links.
    pub one_filesystem: bool,
    /// `/proc/self/fd`, when it cannot be opened by that name.
    pub proc_self_fd: Option<File>,
    /// An open file in each file system that the guest may write.
    pub writable: Vec<File>,
}

/// Whether only the guest changes what lies there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cache {
    /// Nobody else does: remember all.
    Keep,
    /// Nobody else does: remember all but file contents. Files cannot be mapped.
    KeepNames,
    /// The host may: ask each time.
    Ask,
}

/// The settings of one passthrough file system.
pub(super) fn passthrough(
    root: &Path,
    cache: Cache,
    announce_submounts: bool,
    guest_fds: u64,
    proc_self_fd: Option<&File>,
) -> io::Result<Config> {
    let (timeout, cache_policy) = match cache {
        Cache::Keep => (FOREVER, CachePolicy::Always),
        Cache::KeepNames => (FOREVER, CachePolicy::Metadata),
        Cache::Ask => (Duration::ZERO, CachePolicy::Auto),
    };
    let root_dir = root.to_str().ok_or_else(|| io::Error::other("share root is not UTF-8"))?.to_owned();
    Ok(Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        root_dir,
        proc_sfd_rawfd: proc_self_fd.map(File::try_clone).transpose()?,
        xattr: true,
        xattrmap: Some(xattr_rules()?),
        announce_submounts,
        // File handles would need CAP_DAC_READ_SEARCH, with which one can open any file of a file system.
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        writeback: false,
        // The guest kernel clears set-user-ID bits itself. Left to the daemon, they would stay when the write
        // comes through an overlay, which writes as root.
        killpriv_v2: false,
        posix_acl: NegotiationMode::Auto,
        guest_fd_limit: guest_fds,
        ..Config::default()
    })
}

fn xattr_rules() -> io::Result<XattrMap> {
    XattrMap::try_from(XATTR_RULES).map_err(|error| io::Error::other(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use virtiofsd::passthrough::xattrmap::AppliedRule;

    use super::*;

    #[test]
    fn only_known_attributes_pass() {
        let map = xattr_rules().unwrap();
        let passes = |name: &str| {
            let name = CString::new(name).unwrap();
            matches!(map.map_client_xattr(&name).unwrap(), AppliedRule::Pass(same) if *same == *name)
        };
        for name in ["user.x", "trusted.overlay.opaque", "security.capability", "system.posix_acl_access"] {
            assert!(passes(name), "{name}");
        }
        for name in
            ["trusted.x", "trusted.overlay", "security.ima", "security.selinux", "system.nfs4_acl", "x"]
        {
            assert!(!passes(name), "{name}");
        }
    }

    #[test]
    fn other_attributes_are_not_listed() {
        let map = xattr_rules().unwrap();
        let listed = b"security.selinux\0user.a\0trusted.md5sum\0trusted.overlay.origin\0".to_vec();
        assert_eq!(map.map_server_xattrlist(listed).unwrap(), b"user.a\0trusted.overlay.origin\0");
    }
}
