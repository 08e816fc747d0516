//! Removes trees of any depth with a fixed number of handles.
//!
//! Folders within folders are moved up to the top before they are emptied, so that no path grows and
//! nothing recurses:
//!
//! ```text
//! top/a/b/c  ─>  top/a, top/.0 (was b)/c  ─>  top/.0, top/.1 (was c)  ─>  top
//! ```

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{self, AtFlags, RawDir};
use rustix::io::Errno;

use crate::beneath::Node;

/// Names taken from a folder at a time.
const BATCH: usize = 10_000;

/// Some of the names in a folder; all if there are not more than are taken at a time.
fn some_names(dir: &Node, most: usize) -> io::Result<Vec<Vec<u8>>> {
    let fd = dir.open_dir()?;
    let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
    let mut entries = RawDir::new(fd, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        match entry?.file_name().to_bytes() {
            b"." | b".." => {}
            name => names.push(name.to_vec()),
        }
        if names.len() == most {
            break;
        }
    }
    Ok(names)
}

/// All names in a folder that this process made.
pub(super) fn names(dir: &Node) -> io::Result<Vec<Vec<u8>>> {
    some_names(dir, usize::MAX)
}

/// Removes `name` in `dir` and all that is beneath it.
pub(super) fn remove(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let shown = OsStr::from_bytes(name);
    match fs::unlinkat(dir, shown, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        result => return Ok(result?),
    }
    let Some(top) = Node::new(dir.try_clone_to_owned()?)?.child(name)? else { return Ok(()) };
    let mut moved = 0;
    loop {
        let batch = some_names(&top, BATCH)?;
        if batch.is_empty() {
            return Ok(fs::unlinkat(dir, shown, AtFlags::REMOVEDIR)?);
        }
        for name in batch {
            remove_in(&top, &name, &mut moved)?;
        }
    }
}

/// Removes an entry of the top folder, moving folders within it up.
fn remove_in(top: &Node, name: &[u8], moved: &mut u64) -> io::Result<()> {
    let shown = OsStr::from_bytes(name);
    let Some(node) = top.child(name)? else { return Ok(()) };
    if !node.is_dir() {
        return Ok(fs::unlinkat(top.as_fd(), shown, AtFlags::empty())?);
    }
    while let batch = some_names(&node, BATCH)?
        && !batch.is_empty()
    {
        for inner in batch {
            empty_one(top, &node, &inner, moved)?;
        }
    }
    Ok(fs::unlinkat(top.as_fd(), shown, AtFlags::REMOVEDIR)?)
}

fn empty_one(top: &Node, dir: &Node, name: &[u8], moved: &mut u64) -> io::Result<()> {
    let shown = OsStr::from_bytes(name);
    match fs::unlinkat(dir.as_fd(), shown, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        result => return Ok(result?),
    }
    loop {
        *moved += 1;
        let place = format!(".vmctr-removed-{moved}");
        match fs::renameat_with(dir.as_fd(), shown, top.as_fd(), &place, fs::RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            result => return Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::TreePath;

    #[test]
    fn trees_deeper_than_any_path_go() {
        let dir = tempfile::tempdir().unwrap();
        let root = Node::root(dir.path()).unwrap();
        let mut path = TreePath::root();
        for level in 0..1500 {
            path.push(b"folder");
            let above = root.descend(&path.parent().unwrap()).unwrap().unwrap();
            fs::mkdirat(above.as_fd(), "folder", fs::Mode::RWXU).unwrap();
            if level % 100 == 0 {
                fs::mkdirat(above.as_fd(), "beside", fs::Mode::RWXU).unwrap();
                fs::symlinkat("/etc", above.as_fd(), "out").unwrap();
            }
        }
        remove(root.as_fd(), b"folder").unwrap();
        assert!(!dir.path().join("folder").exists());
        assert!(std::path::Path::new("/etc").exists());
        for name in [b"beside".as_slice(), b"out"] {
            remove(root.as_fd(), name).unwrap();
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
