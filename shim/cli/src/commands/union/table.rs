//! The kernel's table of mounts.
//!
//! ```text
//!   36 35 0:55 / /mnt/a\040b rw,nosuid shared:1 - fuse.vmctr vmctr rw,user_id=0
//!   │     │    │ └ mountpoint                     └ type     └ source
//!   │     │    └ the file system's folder that is mounted
//!   └ ID  └ device: the same wherever this file system is mounted, and no other's as long as it is there
//! ```

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};

/// The type of our mounts.
pub const TYPE: &str = "fuse.vmctr";

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The mount.
    pub id: u64,
    /// Its file system.
    pub device: String,
    /// Its folder in that.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// What it was mounted from.
    pub source: String,
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let (mut left, mut right) = (left.split(' '), right.split(' '));
        let id = left.next()?.parse().ok()?;
        let device = left.nth(1)?.to_owned();
        let (root, point) = (unescaped(left.next()?).into(), unescaped(left.next()?).into());
        let (kind, source) = (right.next()?.to_owned(), unescaped(right.next()?));
        Some(Self { id, device, root, point, kind, source })
    }

    /// Whether it is a mount of ours.
    pub fn is_ours(&self) -> bool {
        self.kind == TYPE
    }
}

/// The lines of a table; what is no line is passed over.
pub fn parse(table: &str) -> Vec<Line> {
    table.lines().filter_map(Line::parse).collect()
}

/// This process's mounts; none where /proc is not there.
pub fn own() -> Vec<Line> {
    parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// The mount that a path leads to, if its mountpoint is this very path. The mount itself is not asked, which may not
/// answer any more.
pub fn topmost(place: &Path) -> Option<Line> {
    let folder = open(place, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", folder.as_raw_fd())).ok()?;
    let id: u64 = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()?;
    own().into_iter().find(|line| line.id == id && line.point == place)
}

/// The kernel writes spaces and the like as a backslash and three octal digits.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.extend(code);
        plain.extend_from_slice(part.get(3..).unwrap_or_default().as_bytes());
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_with_its_escapes() {
        let table = "nonsense\n\
                     36 35 0:55 / /mnt/a\\040b\\134 rw,nosuid shared:1 - fuse.vmctr vm\\040ctr rw,user_id=0\n";
        let line = Line {
            id: 36,
            device: "0:55".into(),
            root: "/".into(),
            point: "/mnt/a b\\".into(),
            kind: TYPE.into(),
            source: "vm ctr".into(),
        };
        assert!(line.is_ours());
        assert_eq!(parse(table), [line]);
    }

    #[test]
    fn what_a_path_leads_to_is_found_where_it_is_mounted_only() {
        assert_eq!(topmost(Path::new("/proc")).unwrap().kind, "proc");
        assert_eq!(topmost(Path::new("/proc/self")), None);
        assert_eq!(topmost(Path::new("/nonexistent")), None);
    }
}
