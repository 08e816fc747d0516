//! Random operations on a tree, as a container would do them.
//!
//! Names come from a small set, so that operations meet each other's results. An operation that makes
//! no sense where it lands (a folder moved into itself, a link across file systems) is skipped.

use std::ffi::OsStr;
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use proptest::prelude::*;
use rustix::fs::{XattrFlags, lremovexattr, lsetxattr};

/// A place: up to four names of the set, mostly one or two.
pub type Place = Vec<u8>;

const NAMES: &[&[u8]] = &[b"a", b"b", b"a.d", b"new\nline", b"\xff\xfe"];

/// What a symbolic link says.
pub type Target = Vec<u8>;

#[derive(Debug, Clone)]
pub enum Op {
    Write(Place, u16),
    Sparse(Place, u16),
    Append(Place),
    Mkdir(Place),
    Remove(Place),
    /// Remove a folder and make an empty one of the same name: opaque.
    Renew(Place),
    Rename(Place, Place),
    Link(Place, Place),
    /// To one of the names, or to nothing.
    Symlink(Place, Target),
    Chmod(Place, u16),
    Chown(Place, u32, u32),
    Touch(Place, i32, u32),
    Xattr(Place, u8, u8),
    DropXattr(Place, u8),
    Node(Place, u8),
    /// chmod and back.
    Nothing(Place),
}

fn place() -> impl Strategy<Value = Place> {
    let name = 0..NAMES.len() as u8;
    prop_oneof![
        3 => proptest::collection::vec(name.clone(), 1..3),
        1 => proptest::collection::vec(name, 3..5),
    ]
}

/// Half of them lead to what another operation may have made.
fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        (0..NAMES.len()).prop_map(|name| NAMES[name].to_vec()),
        any::<u8>().prop_map(|n| content(u16::from(n) + 1)[..1 + usize::from(n)].to_vec()),
    ]
}

pub fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (place(), any::<u16>()).prop_map(|(p, n)| Op::Write(p, n)),
        1 => (place(), any::<u16>()).prop_map(|(p, n)| Op::Sparse(p, n)),
        2 => place().prop_map(Op::Append),
        3 => place().prop_map(Op::Mkdir),
        3 => place().prop_map(Op::Remove),
        2 => place().prop_map(Op::Renew),
        5 => (place(), place()).prop_map(|(p, q)| Op::Rename(p, q)),
        3 => (place(), place()).prop_map(|(p, q)| Op::Link(p, q)),
        2 => (place(), target()).prop_map(|(p, t)| Op::Symlink(p, t)),
        2 => (place(), 0u16..0o10000).prop_map(|(p, m)| Op::Chmod(p, m)),
        1 => (place(), 0u32..200_000, 0u32..200_000).prop_map(|(p, u, g)| Op::Chown(p, u, g)),
        1 => (place(), any::<i32>(), 0u32..1_000_000_000).prop_map(|(p, s, n)| Op::Touch(p, s, n)),
        2 => (place(), 0u8..6, any::<u8>()).prop_map(|(p, n, v)| Op::Xattr(p, n, v)),
        1 => (place(), 0u8..6).prop_map(|(p, n)| Op::DropXattr(p, n)),
        2 => (place(), any::<u8>()).prop_map(|(p, n)| Op::Node(p, n)),
        2 => place().prop_map(Op::Nothing),
    ]
}

pub fn ops(most: usize) -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(op(), 0..most)
}

/// A place for something new: with folders above it.
fn new_path(root: &Path, place: &Place) -> PathBuf {
    let path = path(root, place);
    let _ = fs::create_dir_all(path.parent().unwrap());
    path
}

fn path(root: &Path, place: &Place) -> PathBuf {
    place.iter().fold(root.to_owned(), |path, &name| path.join(OsStr::from_bytes(NAMES[name as usize])))
}

/// Carries out what makes sense.
pub fn run(root: &Path, ops: &[Op]) {
    for op in ops {
        let _ = one(root, op);
    }
}

fn one(root: &Path, op: &Op) -> std::io::Result<()> {
    match op {
        Op::Write(at, n) => fs::write(harmless(new_path(root, at))?, content(*n)),
        Op::Sparse(at, n) => {
            let mut file = fs::File::create(harmless(new_path(root, at))?)?;
            file.seek(SeekFrom::Start(u64::from(*n) * 64))?;
            file.write_all(b"end of the hole")?;
            file.set_len(u64::from(*n) * 100)
        }
        Op::Append(at) => {
            fs::File::options().append(true).open(harmless(path(root, at))?)?.write_all(b"more")
        }
        Op::Mkdir(at) => fs::create_dir_all(path(root, at)),
        Op::Remove(at) => remove(&path(root, at)),
        Op::Renew(at) => {
            fs::remove_dir_all(path(root, at))?;
            fs::create_dir(path(root, at))
        }
        Op::Rename(from, to) => fs::rename(path(root, from), new_path(root, to)),
        Op::Link(from, to) => {
            let from = new_path(root, from);
            if from.symlink_metadata().is_err() {
                fs::write(&from, "linked")?;
            }
            fs::hard_link(from, new_path(root, to))
        }
        Op::Symlink(at, to) => symlink(OsStr::from_bytes(to), path(root, at)),
        Op::Chmod(at, mode) => chmod(&path(root, at), u32::from(*mode)),
        Op::Chown(at, uid, gid) => lchown(path(root, at), Some(*uid), Some(*gid)),
        Op::Touch(at, secs, nanos) => touch(&path(root, at), *secs, *nanos),
        Op::Xattr(at, n, value) => xattr(&path(root, at), *n, *value),
        Op::DropXattr(at, n) => Ok(lremovexattr(path(root, at), XATTRS[*n as usize].0)?),
        Op::Node(at, n) => node(&new_path(root, at), *n),
        Op::Nothing(at) => nothing(&path(root, at)),
    }
}

/// Only regular files are opened: a fifo would block and a device may be a real one.
fn harmless(path: PathBuf) -> std::io::Result<PathBuf> {
    match path.symlink_metadata() {
        Ok(meta) if !meta.is_file() => Err(std::io::ErrorKind::InvalidInput.into()),
        _ => Ok(path),
    }
}

/// Distinct bytes of a distinct length, sometimes over a page.
fn content(n: u16) -> Vec<u8> {
    (0..n % 5000).map(|i| (i ^ n) as u8 | 1).collect()
}

fn remove(path: &Path) -> std::io::Result<()> {
    match path.symlink_metadata()?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
}

fn chmod(path: &Path, mode: u32) -> std::io::Result<()> {
    if path.symlink_metadata()?.is_symlink() {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn touch(path: &Path, secs: i32, nanos: u32) -> std::io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let time = Timespec { tv_sec: secs.into(), tv_nsec: nanos.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Attributes whose values the kernel checks come with one that it takes.
const XATTRS: [(&str, Option<&[u8]>); 6] = [
    ("user.short", None),
    ("user.with space", None),
    ("trusted.own", None),
    ("security.capability", Some(&[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
    ("system.posix_acl_access", Some(ACL)),
    ("system.posix_acl_default", Some(ACL)),
];

/// Places among the attributes.
pub const TRUSTED: u8 = 2;
pub const DEFAULT_ACL: u8 = 5;

/// u::rwx, u:1234:r--, g::r-x, m::r-x, o::---
const ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xd2, 4, 0, 0, 4, 0, 5, 0, 255, 255, 255, 255,
    16, 0, 5, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];

fn xattr(path: &Path, n: u8, value: u8) -> std::io::Result<()> {
    let (name, fixed) = XATTRS[n as usize];
    // Readers written in Go lose attributes without a value; our own reader's case is in `hostile`.
    let own = vec![value; usize::from(value) * 3 + 1];
    Ok(lsetxattr(path, name, fixed.unwrap_or(&own), XattrFlags::empty())?)
}

fn node(path: &Path, n: u8) -> std::io::Result<()> {
    let kind = [SFlag::S_IFIFO, SFlag::S_IFCHR, SFlag::S_IFBLK][n as usize % 3];
    // 0/0 is what overlayfs itself would refuse.
    Ok(mknod(path, kind, Mode::from_bits_truncate(0o640), makedev(u64::from(n) + 1, u64::from(n) * 1000))?)
}

/// Changes something and takes it back: copied up, and yet the same.
fn nothing(path: &Path) -> std::io::Result<()> {
    let meta = path.symlink_metadata()?;
    if meta.is_symlink() {
        return Ok(());
    }
    let mode = meta.permissions().mode();
    chmod(path, mode ^ 0o001)?;
    chmod(path, mode)?;
    chown(path, None, None)
}

/// A time that no clock of the test shows.
pub fn fixed_time() -> std::time::SystemTime {
    UNIX_EPOCH + Duration::from_nanos(1_600_000_000_123_456_789)
}
