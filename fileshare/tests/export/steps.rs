//! Random operations on a tree, what came of them, and what the tree is like then: for two mounts to be compared.
//!
//! Two test programs make use of it: the one of this crate, and the end-to-end one of unions.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::RwLock;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, RenameFlags, XattrFlags};
use rustix::io::Errno;

/// Who does what root does not.
pub const USER: u32 = 1001;

/// Places in the tree; the first ones are in the lower folder.
const NAMES: [&str; 14] =
    ["d", "d/f", "d/s", "d/s/g", "f", "l", "h1", "h2", "n", "d/n", "d/s/n", "e", "e/x", "e/y"];

/// One operation; places are indices into [`NAMES`].
#[derive(Clone, Debug)]
pub enum Step {
    Create(usize, u32),
    Write(usize, u64, usize),
    Truncate(usize, u64),
    Read(usize),
    MakeDir(usize),
    RemoveDir(usize),
    Unlink(usize),
    Rename(usize, usize, u32),
    Link(usize, usize),
    Symlink(usize, usize),
    ReadLink(usize),
    Chmod(usize, u32),
    Chown(usize, u32),
    Times(usize, i64),
    SetXattr(usize, u8),
    GetXattr(usize),
    RemoveXattr(usize),
    Stat(usize),
    List(usize),
    Fifo(usize),
    Punch(usize, u64),
    /// To a file's end, wherever that is.
    Append(usize, usize),
    /// Written to before and after it was renamed.
    WriteMoved(usize, usize),
    /// Written to before and after it got another name and lost the first.
    WriteLinked(usize, usize),
    /// From one file to the other.
    Copy(usize, usize, u64),
    /// What the kernel remembers of names and files.
    Forget,
}

/// A step, and whether the user does it.
pub fn step() -> impl Strategy<Value = (Step, bool)> {
    let name = || 0..NAMES.len();
    let step = prop_oneof![
        3 => (name(), prop::sample::select(vec![0o644u32, 0o600, 0o755])).prop_map(|(n, m)| Step::Create(n, m)),
        3 => (name(), 0..9000u64, 1..9000usize).prop_map(|(n, at, length)| Step::Write(n, at, length)),
        1 => (name(), 0..9000u64).prop_map(|(n, size)| Step::Truncate(n, size)),
        2 => name().prop_map(Step::Read),
        3 => name().prop_map(Step::MakeDir),
        2 => name().prop_map(Step::RemoveDir),
        3 => name().prop_map(Step::Unlink),
        5 => (name(), name(), 0..3u32).prop_map(|(from, to, flags)| Step::Rename(from, to, flags)),
        3 => (name(), name()).prop_map(|(from, to)| Step::Link(from, to)),
        1 => (name(), name()).prop_map(|(to, at)| Step::Symlink(to, at)),
        1 => name().prop_map(Step::ReadLink),
        2 => (name(), 0..0o10000u32).prop_map(|(n, mode)| Step::Chmod(n, mode)),
        1 => (name(), prop::sample::select(vec![0u32, USER])).prop_map(|(n, uid)| Step::Chown(n, uid)),
        1 => (name(), 0..2_000_000_000i64).prop_map(|(n, time)| Step::Times(n, time)),
        1 => (name(), any::<u8>()).prop_map(|(n, value)| Step::SetXattr(n, value)),
        1 => name().prop_map(Step::GetXattr),
        1 => name().prop_map(Step::RemoveXattr),
        3 => name().prop_map(Step::Stat),
        2 => name().prop_map(Step::List),
        1 => name().prop_map(Step::Fifo),
        1 => (name(), 0..9000u64).prop_map(|(n, at)| Step::Punch(n, at)),
        3 => (name(), 1..9000usize).prop_map(|(n, length)| Step::Append(n, length)),
        1 => (name(), name()).prop_map(|(from, to)| Step::WriteMoved(from, to)),
        1 => (name(), name()).prop_map(|(from, to)| Step::WriteLinked(from, to)),
        2 => (name(), name(), 0..9000u64).prop_map(|(from, to, at)| Step::Copy(from, to, at)),
        1 => Just(Step::Forget),
    ];
    // One in five is a user's.
    (step, prop::bool::weighted(0.2))
}

/// What came of a step, comparable.
pub fn outcome(result: io::Result<String>) -> String {
    match result {
        Ok(what) => what,
        Err(error) => format!("error {:?}", error.raw_os_error()),
    }
}

/// Does a step below `root`.
///
/// # Errors
/// The step's own.
pub fn act(root: &Path, step: &Step) -> io::Result<String> {
    let at = |name: &usize| root.join(NAMES[*name]);
    let done = |result: rustix::io::Result<()>| result.map(|()| String::new()).map_err(io::Error::from);
    let open_to_write = |name: &usize| File::options().write(true).open(no_fifo(at(name))?);
    match step {
        Step::Create(name, mode) => {
            use std::os::unix::fs::OpenOptionsExt;
            File::options().write(true).create_new(true).mode(*mode).open(at(name)).map(|_| String::new())
        }
        Step::Write(name, offset, length) => open_to_write(name)?
            .write_at(&vec![(*offset % 251) as u8; *length], *offset)
            .map(|n| n.to_string()),
        Step::Truncate(name, size) => open_to_write(name)?.set_len(*size).map(|()| String::new()),
        Step::Read(name) => fs::read(no_fifo(at(name))?).map(|bytes| digest(&bytes)),
        Step::MakeDir(name) => fs::create_dir(at(name)).map(|()| String::new()),
        Step::RemoveDir(name) => fs::remove_dir(at(name)).map(|()| String::new()),
        Step::Unlink(name) => fs::remove_file(at(name)).map(|()| String::new()),
        Step::Rename(from, to, flags) => {
            let flags =
                [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE][*flags as usize];
            done(rustix::fs::renameat_with(CWD, at(from), CWD, at(to), flags))
        }
        Step::Link(from, to) => fs::hard_link(at(from), at(to)).map(|()| String::new()),
        Step::Symlink(to, name) => std::os::unix::fs::symlink(NAMES[*to], at(name)).map(|()| String::new()),
        Step::ReadLink(name) => fs::read_link(at(name)).map(|path| path.display().to_string()),
        Step::Chmod(name, mode) => {
            done(rustix::fs::chmodat(CWD, at(name), Mode::from_raw_mode(*mode), AtFlags::empty()))
        }
        Step::Chown(name, uid) => {
            std::os::unix::fs::lchown(at(name), Some(*uid), Some(*uid)).map(|()| String::new())
        }
        Step::Times(name, time) => {
            let time = rustix::fs::Timespec { tv_sec: *time, tv_nsec: 987_654_321 };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            done(rustix::fs::utimensat(CWD, at(name), &times, AtFlags::SYMLINK_NOFOLLOW))
        }
        Step::SetXattr(name, value) => {
            done(rustix::fs::setxattr(at(name), "user.test", &[*value], XattrFlags::empty()))
        }
        Step::GetXattr(name) => {
            let mut value = [0; 4];
            let length = rustix::fs::getxattr(at(name), "user.test", &mut value)?;
            Ok(format!("{:?}", &value[..length]))
        }
        Step::RemoveXattr(name) => done(rustix::fs::removexattr(at(name), "user.test")),
        Step::Stat(name) => describe(&at(name)),
        Step::List(name) => {
            let mut names = fs::read_dir(at(name))?
                .map(|entry| {
                    entry.map(|entry| format!("{:?} {:?}", entry.file_name(), entry.file_type().ok()))
                })
                .collect::<io::Result<Vec<_>>>()?;
            names.sort();
            Ok(names.concat())
        }
        Step::Fifo(name) => {
            done(rustix::fs::mknodat(CWD, at(name), FileType::Fifo, Mode::from_raw_mode(0o644), 0))
        }
        Step::Punch(name, offset) => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            done(rustix::fs::fallocate(open_to_write(name)?, flags, *offset, 4096))
        }
        Step::Append(name, length) => {
            let mut file = File::options().append(true).open(no_fifo(at(name))?)?;
            io::Write::write(&mut file, &vec![(*length % 251) as u8; *length]).map(|n| n.to_string())
        }
        Step::WriteMoved(from, to) => {
            let file = open_to_write(from)?;
            file.write_at(b"before", 0)?;
            let moved = fs::rename(at(from), at(to)).map(|()| String::new());
            file.write_at(b"after", 6)?;
            Ok(outcome(moved) + &describe_open(&file)?)
        }
        Step::WriteLinked(from, to) => {
            let file = open_to_write(from)?;
            file.write_at(b"before", 0)?;
            let linked = fs::hard_link(at(from), at(to)).and_then(|()| fs::remove_file(at(from)));
            file.write_at(b"after", 6)?;
            Ok(outcome(linked.map(|()| String::new())) + &describe_open(&file)?)
        }
        Step::Copy(from, to, offset) => {
            let (from, to) = (File::open(no_fifo(at(from))?)?, open_to_write(to)?);
            let copied =
                rustix::fs::copy_file_range(&from, Some(&mut 100), &to, Some(&mut { *offset }), 5000)?;
            Ok(copied.to_string())
        }
        // Only who may does it; the other side sees nothing of it.
        Step::Forget => {
            forget();
            Ok(String::new())
        }
    }
}

/// Whoever measures what the kernel remembers holds this.
pub static REMEMBERED: RwLock<()> = RwLock::new(());

/// Has the kernel forget files and names, where it may be told to.
pub fn forget() {
    let _forgetting = REMEMBERED.read();
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}

/// Opening a fifo would wait for its other end.
fn no_fifo(path: PathBuf) -> io::Result<PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    match fs::metadata(&path) {
        Ok(meta) if meta.file_type().is_fifo() => Err(Errno::NXIO.into()),
        _ => Ok(path),
    }
}

fn digest(bytes: &[u8]) -> String {
    let sum = bytes.iter().fold(1u64, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
    format!("{} bytes {sum:x}", bytes.len())
}

/// All that is to be equal about a file; not its number, not times that were not set, and not when it was read:
/// what comes from a cache is not noted.
fn describe(path: &Path) -> io::Result<String> {
    let meta = fs::symlink_metadata(path)?;
    let set = |time: i64, part: i64| if part == 987_654_321 { time } else { 0 };
    let time = set(meta.mtime(), meta.mtime_nsec());
    let (size, links) = if meta.is_dir() { (0, 0) } else { (meta.len(), meta.nlink()) };
    Ok(format!("{:o} {}:{} {size} x{links} {} {time}", meta.mode(), meta.uid(), meta.gid(), meta.rdev()))
}

/// The same of a file that is open, whatever its names are.
fn describe_open(file: &File) -> io::Result<String> {
    let meta = file.metadata()?;
    Ok(format!(" {} x{}", meta.len(), meta.nlink()))
}

/// The tree below `root`: what each name is, and holds.
pub fn tree(root: &Path, with_marks: bool) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("readable").path();
            let meta = fs::symlink_metadata(&path).expect("there");
            let mut what = describe(&path).expect("there");
            if meta.is_file() {
                what += &digest(&fs::read(&path).expect("readable"));
            } else if meta.is_symlink() {
                what += &fs::read_link(&path).expect("a link").display().to_string();
            } else if meta.is_dir() {
                folders.push(path.clone());
            }
            if with_marks {
                what += &marks(&path);
            }
            all.insert(path.strip_prefix(root).expect("below").to_owned(), what);
        }
    }
    all
}

/// The overlay's marks that say what a folder means.
fn marks(path: &Path) -> String {
    let mut all = String::new();
    for name in ["trusted.overlay.opaque", "trusted.overlay.redirect", "user.test"] {
        let mut value = [0; 256];
        if let Ok(length) = rustix::fs::lgetxattr(path, name, &mut value) {
            all += &format!(" {name}={}", String::from_utf8_lossy(&value[..length]));
        }
    }
    all
}

/// A lower folder that the steps find something in.
pub fn fill(lower: &Path) {
    fs::create_dir_all(lower.join("d/s")).expect("writable");
    for name in ["d/f", "d/s/g", "f"] {
        fs::write(lower.join(name), vec![name.len() as u8; 5000]).expect("writable");
    }
    std::os::unix::fs::symlink("f", lower.join("l")).expect("writable");
    // Not linked to each other: which of a lower file's names a change goes up under is overlay's choice.
    fs::write(lower.join("h1"), "one").expect("writable");
    fs::write(lower.join("h2"), "other").expect("writable");
    for (name, mode) in [("d", 0o777), ("f", 0o666), ("d/f", 0o4755)] {
        fs::set_permissions(lower.join(name), fs::Permissions::from_mode(mode)).expect("writable");
    }
}
