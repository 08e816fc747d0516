//! overlayfs's own extended attributes: what they mean, and telling them from a container's.
//!
//! An overlay keeps its notes as `trusted.overlay.*`, or as `user.overlay.*` if it was mounted with
//! `userxattr`; only one of the two has a meaning in a given upper. An attribute that a container gives
//! such a name itself (an overlay within the container) is stored with one more `overlay.`.

use std::io;

use crate::beneath::Node;
use crate::meta::Xattrs;

/// Under which names the overlay kept its notes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Namespace {
    /// `trusted.overlay.*`, the default.
    #[default]
    Trusted,
    /// `user.overlay.*`, for overlays mounted with `userxattr`.
    User,
}

const ESCAPE: &[u8] = b"overlay.";
/// Labels belong to the host's policy, not to the image.
const HOST_ONLY: &[u8] = b"security.selinux";

impl Namespace {
    fn prefix(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.",
            Self::User => b"user.overlay.",
        }
    }

    fn name(self, mark: &[u8]) -> Vec<u8> {
        [self.prefix(), mark].concat()
    }
}

/// How a container's attribute is stored in an upper folder.
pub(crate) fn escape(namespace: Namespace, name: &[u8]) -> Vec<u8> {
    match name.strip_prefix(namespace.prefix()) {
        Some(rest) => [namespace.prefix(), ESCAPE, rest].concat(),
        None => name.to_vec(),
    }
}

/// What the overlay noted on an inode.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Marks {
    /// A folder that hides those below it.
    pub opaque: bool,
    /// A folder in which empty files with a mark are whiteouts.
    pub holds_whiteout_files: bool,
    /// Where in the layers below this was before a rename.
    pub redirect: Option<Vec<u8>>,
    /// A file with metadata only.
    pub metacopy: bool,
    /// A whiteout in the form of an empty file.
    pub whiteout: bool,
    /// The link count of an indexed file, in the overlay's notation.
    pub nlink: Option<Vec<u8>>,
}

impl Marks {
    /// The marks and the container's own attributes of an inode.
    pub(crate) fn split(stored: Xattrs, namespace: Namespace) -> (Self, Xattrs) {
        let mut marks = Self::default();
        let mut own = Xattrs::new();
        for (name, value) in stored {
            match name.strip_prefix(namespace.prefix()) {
                Some(mark) => match mark.strip_prefix(ESCAPE) {
                    Some(rest) => drop(own.insert(namespace.name(rest), value)),
                    None => marks.note(mark, value),
                },
                None if is_content(&name) => drop(own.insert(name, value)),
                None => {}
            }
        }
        (marks, own)
    }

    fn note(&mut self, mark: &[u8], value: Vec<u8>) {
        match mark {
            b"opaque" => {
                self.opaque = value == b"y";
                self.holds_whiteout_files = value == b"x";
            }
            b"redirect" => self.redirect = Some(value),
            b"metacopy" => self.metacopy = true,
            b"whiteout" => self.whiteout = true,
            b"nlink" => self.nlink = Some(value),
            // origin, impure, upper, uuid, protattr: bookkeeping that says nothing about content.
            _ => {}
        }
    }

    /// What decides how a folder merges with those below.
    pub(crate) fn of_dir(node: &Node, namespace: Namespace) -> io::Result<Self> {
        let mut marks = Self::default();
        for mark in [b"opaque".as_slice(), b"redirect"] {
            if let Some(value) = node.xattr(&namespace.name(mark))? {
                marks.note(mark, value);
            }
        }
        Ok(marks)
    }

    /// What decides where a file's content is.
    pub(crate) fn of_file(node: &Node, namespace: Namespace) -> io::Result<Self> {
        let mut marks =
            Self { metacopy: node.xattr(&namespace.name(b"metacopy"))?.is_some(), ..Self::default() };
        if marks.metacopy {
            marks.redirect = node.xattr(&namespace.name(b"redirect"))?;
        }
        Ok(marks)
    }

    /// Whether an empty file in a folder marked for it is a whiteout.
    pub(crate) fn is_whiteout_file(node: &Node, namespace: Namespace) -> io::Result<bool> {
        Ok(node.stat.size == 0 && node.xattr(&namespace.name(b"whiteout"))?.is_some())
    }
}

/// Attributes that belong to an image, rather than to the host's file system.
pub(crate) fn is_content(name: &[u8]) -> bool {
    let known = [b"user.".as_slice(), b"trusted.", b"security.", b"system.posix_acl_"];
    name != HOST_ONLY && known.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(pairs: &[(&str, &str)]) -> Xattrs {
        pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
    }

    #[test]
    fn only_the_mounts_own_namespace_has_a_meaning() {
        let xattrs = stored(&[("trusted.overlay.opaque", "y"), ("user.overlay.redirect", "/a")]);
        let (marks, own) = Marks::split(xattrs.clone(), Namespace::Trusted);
        assert!(marks.opaque && marks.redirect.is_none());
        assert_eq!(own, stored(&[("user.overlay.redirect", "/a")]));
        let (marks, own) = Marks::split(xattrs, Namespace::User);
        assert!(!marks.opaque && marks.redirect.as_deref() == Some(b"/a"));
        assert_eq!(own, stored(&[("trusted.overlay.opaque", "y")]));
    }

    #[test]
    fn a_containers_own_overlay_attributes_are_unescaped_and_escaped_back() {
        let xattrs = stored(&[("trusted.overlay.overlay.opaque", "y"), ("trusted.overlay.origin", "o")]);
        let (marks, own) = Marks::split(xattrs, Namespace::Trusted);
        assert_eq!(marks, Marks::default());
        assert_eq!(own, stored(&[("trusted.overlay.opaque", "y")]));
        assert_eq!(escape(Namespace::Trusted, b"trusted.overlay.opaque"), b"trusted.overlay.overlay.opaque");
        assert_eq!(escape(Namespace::User, b"trusted.overlay.opaque"), b"trusted.overlay.opaque");
    }

    #[test]
    fn host_attributes_stay_out() {
        let xattrs =
            stored(&[("security.selinux", "x"), ("system.nfs4_acl", "x"), ("system.posix_acl_access", "a")]);
        let (_, own) = Marks::split(xattrs, Namespace::Trusted);
        assert_eq!(own, stored(&[("system.posix_acl_access", "a")]));
    }
}
