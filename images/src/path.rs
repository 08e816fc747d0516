//! A place in a tree: components below a root, as raw bytes.
//!
//! Invariant: a [`TreePath`] is relative, has no empty, `.` or `..` component and no NUL. It is never
//! handed to the kernel as a whole from the process's root, only walked beneath a folder that is open.
//! Paths order by components, so that a folder is followed by what is in it: `a`, `a/b`, `a.txt`.

use std::cmp::Ordering;
use std::fmt;

/// A path beneath some root; empty for the root itself.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct TreePath(Vec<u8>);

/// Why bytes are no path beneath a root.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    /// A `..` component.
    #[error("It has a `..` component")]
    Upwards,
    /// A NUL byte.
    #[error("It has a NUL byte")]
    Nul,
    /// A component over 255 bytes.
    #[error("A component is longer than 255 bytes")]
    LongName,
}

/// The longest name that Linux file systems take.
pub const NAME_MAX: usize = 255;

impl TreePath {
    /// The root.
    pub fn root() -> Self {
        Self::default()
    }

    /// Parses what an archive or a redirect says: leading slashes, `.` and empty components vanish.
    pub fn parse(bytes: &[u8]) -> Result<Self, PathError> {
        let mut path = Self::root();
        for component in bytes.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => return Err(PathError::Upwards),
                name if name.contains(&0) => return Err(PathError::Nul),
                name if name.len() > NAME_MAX => return Err(PathError::LongName),
                name => path.push(name),
            }
        }
        Ok(path)
    }

    /// Appends a component that a folder listing gave.
    pub(crate) fn push(&mut self, name: &[u8]) {
        debug_assert!(!name.is_empty() && !name.contains(&b'/') && name != b".." && name != b".");
        if !self.0.is_empty() {
            self.0.push(b'/');
        }
        self.0.extend_from_slice(name);
    }

    /// This path and one more component.
    pub(crate) fn join(&self, name: &[u8]) -> Self {
        let mut path = Self(Vec::with_capacity(self.0.len() + 1 + name.len()));
        path.0.extend_from_slice(&self.0);
        path.push(name);
        path
    }

    /// The bytes, components separated by slashes; empty for the root.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether this is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The components from the root down.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|&byte| byte == b'/').filter(|name| !name.is_empty())
    }

    /// The last component; `None` for the root.
    pub fn name(&self) -> Option<&[u8]> {
        self.0.rsplit(|&byte| byte == b'/').next().filter(|name| !name.is_empty())
    }

    /// The folder that holds this; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        let name = self.name()?;
        let end = self.0.len() - name.len();
        Some(Self(self.0[..end.saturating_sub(1)].to_vec()))
    }

    /// Whether `self` is `other` or beneath it.
    pub fn starts_with(&self, other: &Self) -> bool {
        other.is_root()
            || self.0.strip_prefix(other.0.as_slice()).is_some_and(|rest| matches!(rest, [] | [b'/', ..]))
    }
}

impl Ord for TreePath {
    fn cmp(&self, other: &Self) -> Ordering {
        self.components().cmp(other.components())
    }
}

impl PartialOrd for TreePath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Shows any bytes on one line: what is not printable is escaped, so that a name cannot forge output.
impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("/")?;
        write!(f, "{}", Escaped(&self.0))
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes of a guest or an archive, shown so that they cannot forge output.
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    '\\' => f.write_str("\\\\")?,
                    c if c.is_control() => write!(f, "{}", c.escape_default())?,
                    c => write!(f, "{c}")?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(text: &str) -> TreePath {
        TreePath::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn parsing_drops_what_says_nothing_and_refuses_what_leads_out() {
        assert_eq!(path("//a/./b//"), path("a/b"));
        assert!(path("./").is_root());
        assert_eq!(TreePath::parse(b"a/../b"), Err(PathError::Upwards));
        assert_eq!(TreePath::parse(b"a\0b"), Err(PathError::Nul));
        assert_eq!(TreePath::parse(&[b'x'; 256]), Err(PathError::LongName));
    }

    #[test]
    fn a_folder_is_followed_by_what_is_in_it() {
        let mut paths = [path("a.txt"), path("a/b"), path("a"), path("")];
        paths.sort();
        assert_eq!(paths, [path(""), path("a"), path("a/b"), path("a.txt")]);
    }

    #[test]
    fn display_is_one_line_and_tells_bytes_apart() {
        assert_eq!(TreePath::parse(b"a\nb\\\xff\x1b").unwrap().to_string(), "/a\\nb\\\\\\xff\\u{1b}");
    }

    proptest! {
        #[test]
        fn parent_and_name_rebuild_a_path(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(path) = TreePath::parse(&bytes) {
                match (path.parent(), path.name()) {
                    (Some(parent), Some(name)) => {
                        prop_assert!(path.starts_with(&parent));
                        prop_assert_eq!(parent.join(name), path);
                    }
                    (parent, name) => prop_assert!(parent.is_none() && name.is_none() && path.is_root()),
                }
            }
        }
    }
}
