//! Where a folder lies in its file system, whichever mount it is reached through.
//!
//! ```text
//!   mountinfo:  36 35 8:1 /srv /mnt/bound …        /mnt/bound/a  is  8:1, /srv/a
//!               │     │   │    └ mountpoint
//!               │     │   └ the file system's folder that is mounted
//!               └ ID  └ device
//! ```

use std::path::{Path, PathBuf};

use super::table::Line;

/// A folder of a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    device: String,
    path: PathBuf,
}

impl Place {
    /// The place of a path without symbolic links that is reached through the mount with this ID, by the kernel's table
    /// of mounts; none when the table does not show the mount.
    pub fn find(table: &[Line], mount: u64, path: &Path) -> Option<Self> {
        let line = table.iter().find(|line| line.id == mount)?;
        let below = path.strip_prefix(&line.point).ok()?;
        Some(Self { device: line.device.clone(), path: line.root.join(below) })
    }

    /// Whether it is that folder, or lies below it.
    pub fn is_within(&self, outer: &Self) -> bool {
        self.device == outer.device && self.path.starts_with(&outer.path)
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::parse;
    use super::*;

    const TABLE: &str = "36 35 8:1 / / rw shared:1 - ext4 /dev/root rw\n\
                         37 36 8:1 /srv/a\\040b /mnt/x rw - ext4 /dev/root rw\n\
                         38 36 0:9 / /mnt/y rw - tmpfs t rw\n";

    fn place(mount: u64, path: &str) -> Place {
        Place::find(&parse(TABLE), mount, Path::new(path)).unwrap()
    }

    #[test]
    fn a_folder_is_where_it_is_whichever_mount_shows_it() {
        assert_eq!(place(37, "/mnt/x/c"), place(36, "/srv/a b/c"));
        assert!(place(37, "/mnt/x").is_within(&place(36, "/srv")));
        assert!(place(37, "/mnt/x").is_within(&place(36, "/srv/a b")));
        assert!(!place(36, "/srv").is_within(&place(37, "/mnt/x")));
        assert!(!place(36, "/srv/a b2").is_within(&place(37, "/mnt/x")));
        assert!(!place(38, "/mnt/y").is_within(&place(36, "/")));
    }

    #[test]
    fn what_the_table_does_not_show_has_no_place() {
        assert_eq!(Place::find(&parse(TABLE), 99, Path::new("/srv")), None);
        assert_eq!(Place::find(&parse(TABLE), 37, Path::new("/elsewhere")), None);
    }
}
