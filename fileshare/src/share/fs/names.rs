//! Numbers and names that come from the guest.
//!
//! The share is served by up to three passthrough file systems, each with its own table of inodes. A node ID
//! that the guest holds says in its top bits which one it belongs to:
//!
//! ```text
//!   63 62 61                          0
//!   ┌────┬────────────────────────────┐     area 0  share   /share  layers, plain root
//!   │area│ inode in the area's table  │          1  top     /top    upper, work and what lies around them
//!   └────┴────────────────────────────┘          2  volumes /vol
//! ```
//!
//! Invariant: a [`Node`] never stands for the root of the *top* area, the folder around upper and work. That
//! folder has no node ID that the guest could name, and names are single components, so nothing above upper and
//! work can be reached.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::ROOT_ID;

const AREA_SHIFT: u32 = 62;
const INODE_MASK: u64 = (1 << AREA_SHIFT) - 1;

/// One of the passthrough file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    /// The FUSE root, the layers, a plain root folder.
    Share,
    /// The folder that holds upper and work.
    Top,
    /// The volumes.
    Volumes,
}

impl Area {
    pub(super) const ALL: [Self; 3] = [Self::Share, Self::Top, Self::Volumes];

    fn bits(self) -> u64 {
        match self {
            Self::Share => 0,
            Self::Top => 1,
            Self::Volumes => 2,
        }
    }
}

/// A node that the guest may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) area: Area,
    /// In the area's own table.
    pub(super) inode: u64,
}

impl Node {
    /// Reads a node ID from the guest.
    pub(super) fn parse(id: u64) -> io::Result<Self> {
        let area = Area::ALL.into_iter().find(|area| area.bits() == id >> AREA_SHIFT).ok_or_else(stale)?;
        let node = Self { area, inode: id & INODE_MASK };
        if area == Area::Top && node.is_root() { Err(stale()) } else { Ok(node) }
    }

    /// Whether it is the root of its area.
    pub(super) fn is_root(self) -> bool {
        self.inode == ROOT_ID
    }

    /// Whether it is the FUSE root.
    pub(super) fn is_share_root(self) -> bool {
        self.area == Area::Share && self.is_root()
    }
}

/// The node ID for an inode of an area; 0 ("no such name, and remember that") stays 0.
pub(super) fn node_id(area: Area, inode: u64) -> u64 {
    if inode == 0 { 0 } else { inode | (area.bits() << AREA_SHIFT) }
}

/// Refuses a name that is not one plain component: the kernel would walk it as a path.
pub(super) fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn node_ids_survive_the_round_trip(inode in 1..=INODE_MASK, area in 0_usize..3) {
            let area = Area::ALL[area];
            let parsed = Node::parse(node_id(area, inode));
            if area == Area::Top && inode == ROOT_ID {
                prop_assert!(parsed.is_err());
            } else {
                prop_assert_eq!(parsed.unwrap(), Node { area, inode });
            }
        }

        #[test]
        fn no_id_names_the_folder_around_upper_and_work(id: u64) {
            let hidden = Node { area: Area::Top, inode: ROOT_ID };
            prop_assert!(Node::parse(id).map_or(true, |node| node != hidden));
        }

        #[test]
        fn a_path_is_no_component(a in "[a-z.]{0,4}", b in "[a-z.]{0,4}") {
            let path = std::ffi::CString::new(format!("{a}/{b}")).unwrap();
            prop_assert!(component(&path).is_err());
        }
    }

    #[test]
    fn the_hidden_root_has_no_id() {
        assert!(Node::parse(node_id(Area::Top, ROOT_ID)).is_err());
        assert!(Node::parse(3 << AREA_SHIFT | 5).is_err());
    }

    #[test]
    fn dots_are_no_components() {
        for name in [c"", c".", c".."] {
            assert!(component(name).is_err());
        }
        for name in [c"...", c".a", c"a b", c"\xff"] {
            component(name).unwrap();
        }
    }
}
