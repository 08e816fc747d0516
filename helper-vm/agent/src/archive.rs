//! A folder as a tar stream (POSIX pax), with everything that overlayfs keeps in an upper folder.
//!
//! Owners, nanoseconds, hard links, device nodes and all attributes, `trusted.overlay.*` among them, are kept;
//! sockets are not, which tar has no word for. Entries come sorted, a folder before what it holds.
//!
//! Invariant: nothing outside the folder is opened, whatever changes meanwhile: every step goes from an open
//! folder to one name in it and follows no link. A file that shrinks while it is read is filled up with zeros.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::buffer::{SpareCapacity, spare_capacity};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, lgetxattr, llistxattr, major, minor,
    openat, openat2, readlinkat, statat,
};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

/// Bytes of a name, or of a link's target, that fit into the header itself.
const NAME_FIELD: usize = 100;

/// The folder cannot be archived.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {what} {path}", path = path.display())]
    Entry { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot send the archive")]
    Send(#[source] io::Error),
}

/// Archives `folder` into `out`.
///
/// With `upper`, the folder is the merged view of an overlay with that upper folder. It tells which names are one file:
/// an overlay without index may show a file that was copied up under another inode number than its new links.
pub fn write(folder: &Path, upper: Option<&Path>, out: impl Write) -> Result<(), Error> {
    let out = Whole { out, failed: false };
    let upper = upper.map(|upper| {
        let opened = openat(CWD, upper, DIRECTORY, Mode::empty());
        opened.map_err(|e| Error::Entry { what: "open", path: upper.to_owned(), source: e.into() })
    });
    let upper = upper.transpose()?;
    let mut archive = Archive { tar: Builder::new(out), links: HashMap::new(), path: Vec::new(), upper };
    if let Err(error) = archive.folder(folder) {
        archive.tar.get_mut().failed = true;
        return Err(error);
    }
    archive.tar.into_inner().and_then(|mut out| out.flush()).map_err(Error::Send)
}

/// An archive that ended early must not look whole: what is dropped would write an end mark.
struct Whole<W> {
    out: W,
    failed: bool,
}

impl<W: Write> Write for Whole<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.failed { Err(io::ErrorKind::BrokenPipe.into()) } else { self.out.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

struct Archive<W: Write> {
    tar: Builder<W>,
    /// First name of each file that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// Of the entry at hand, for the archive and for messages.
    path: Vec<u8>,
    upper: Option<OwnedFd>,
}

/// An open folder and what of it is still to come.
struct Level {
    dir: OwnedFd,
    names: std::vec::IntoIter<CString>,
    path_len: usize,
}

impl<W: Write> Archive<W> {
    /// Without recursion: how deep the folders go is the container's choice.
    fn folder(&mut self, folder: &Path) -> Result<(), Error> {
        let top = self.at("open", openat(CWD, folder, DIRECTORY, Mode::empty()))?;
        let stat = self.at("look at", rustix::fs::fstat(&top))?;
        let attributes = self.attributes(&top, c".")?;
        self.path.push(b'.');
        self.append(&stat, EntryType::Directory, None, attributes, io::empty())?;
        self.path.clear();
        let mut levels = vec![self.level(top)?];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.next() else {
                levels.pop();
                continue;
            };
            self.path.truncate(level.path_len);
            self.path.extend_from_slice(name.to_bytes());
            if let Some(dir) = self.entry(&level.dir, &name)? {
                self.path.push(b'/');
                levels.push(self.level(dir)?);
            }
        }
        Ok(())
    }

    fn level(&self, dir: OwnedFd) -> Result<Level, Error> {
        let mut names = Vec::new();
        for entry in self.at("list", Dir::read_from(&dir))? {
            let name = self.at("list", entry)?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(Level { dir, names: names.into_iter(), path_len: self.path.len() })
    }

    /// Archives one name; a folder is returned open. What has gone meanwhile is no error.
    fn entry(&mut self, dir: &OwnedFd, name: &CStr) -> Result<Option<OwnedFd>, Error> {
        let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            stat => self.at("look at", stat)?,
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Socket {
            return Ok(None);
        }
        if kind != FileType::Directory && stat.st_nlink > 1 && self.link(&stat)? {
            return Ok(None);
        }
        let attributes = self.attributes(dir, name)?;
        match kind {
            FileType::Directory => {
                let opened = self.at("open", openat(dir, name, DIRECTORY, Mode::empty()))?;
                self.append(&stat, EntryType::Directory, None, attributes, io::empty())?;
                return Ok(Some(opened));
            }
            FileType::Symlink => {
                let target = self.at("read", readlinkat(dir, name, Vec::new()))?;
                self.append(&stat, EntryType::Symlink, Some(target.to_bytes()), attributes, io::empty())?;
            }
            FileType::RegularFile => {
                let file = File::from(self.at("open", openat(dir, name, FILE, Mode::empty()))?);
                self.append(&stat, EntryType::Regular, None, attributes, file)?;
            }
            FileType::CharacterDevice => {
                self.append(&stat, EntryType::Char, None, attributes, io::empty())?;
            }
            FileType::BlockDevice => self.append(&stat, EntryType::Block, None, attributes, io::empty())?,
            _ => self.append(&stat, EntryType::Fifo, None, attributes, io::empty())?,
        }
        Ok(None)
    }

    /// A further name of a file that is in the archive already. False for its first name.
    fn link(&mut self, stat: &Stat) -> Result<bool, Error> {
        let file = self.identity(stat);
        let Some(first) = self.links.get(&file).cloned() else {
            self.links.insert(file, self.path.clone());
            return Ok(false);
        };
        self.append(stat, EntryType::Link, Some(&first), Vec::new(), io::empty())?;
        Ok(true)
    }

    /// Device and inode of the entry at hand: in the upper folder if it is there.
    fn identity(&self, merged: &Stat) -> (u64, u64) {
        let in_upper = self.upper.as_ref().and_then(|upper| {
            let path = OsStr::from_bytes(&self.path);
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let entry = openat2(
                upper,
                path,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                resolve,
            );
            rustix::fs::fstat(entry.ok()?).ok()
        });
        let stat = in_upper.as_ref().filter(|stat| stat.st_nlink > 1).unwrap_or(merged);
        (stat.st_dev, stat.st_ino)
    }

    fn append(
        &mut self,
        stat: &Stat,
        kind: EntryType,
        link: Option<&[u8]>,
        mut records: Records,
        data: impl Read,
    ) -> Result<(), Error> {
        let size = if kind == EntryType::Regular { u64::try_from(stat.st_size).unwrap_or(0) } else { 0 };
        let mut header = header(stat, kind, size).map_err(Error::Send)?;
        name(&mut header, 0, "path", &self.path, &mut records);
        if let Some(link) = link {
            name(&mut header, LINK_FIELD, "linkpath", link, &mut records);
        }
        header.set_cksum();
        records
            .push((b"mtime".to_vec(), time(stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0))));
        let records: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.tar.append(&records_header(records.len() as u64), records.as_slice()).map_err(Error::Send)?;
        // Exactly the announced bytes, whatever becomes of the file.
        let data = data.chain(io::repeat(0)).take(size);
        self.tar.append(&header, data).map_err(Error::Send)
    }

    /// All attributes, as pax records. The path through the open folder follows no link.
    fn attributes(&self, dir: &OwnedFd, name: &CStr) -> Result<Records, Error> {
        let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        path.push(OsStr::from_bytes(name.to_bytes()));
        let names = match answer(|buffer| llistxattr(&path, buffer)) {
            Err(Errno::NOTSUP | Errno::NOENT) => return Ok(Vec::new()),
            names => self.at("list the attributes of", names)?,
        };
        let mut records = Vec::new();
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            match answer(|buffer| lgetxattr(&path, name, buffer)) {
                Err(Errno::NODATA | Errno::NOENT) => {}
                value => {
                    let key = [b"SCHILY.xattr.", name].concat();
                    self.at("archive", sayable(name))?;
                    records.push((key, self.at("read an attribute of", value)?));
                }
            }
        }
        Ok(records)
    }

    fn at<T, E: Into<io::Error>>(&self, what: &'static str, result: Result<T, E>) -> Result<T, Error> {
        let path = || PathBuf::from(OsStr::from_bytes(&self.path));
        result.map_err(|source| Error::Entry { what, path: path(), source: source.into() })
    }
}

/// Keys and values, which both may be any bytes.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// A key ends where its value's equals sign is, so it can have none of its own.
fn sayable(attribute: &[u8]) -> io::Result<()> {
    if attribute.contains(&b'=') {
        let name = String::from_utf8_lossy(attribute);
        return Err(io::Error::other(format!("its attribute {name} has an equals sign in its name")));
    }
    Ok(())
}

/// `LENGTH KEY=VALUE\n`; the length counts itself.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let with = |length: usize| rest + length.to_string().len();
    // One more digit may be what the digits need.
    let length = with(with(rest)).to_string();
    [length.as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// Of an entry that holds the records of the one after it.
fn records_header(size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::XHeader);
    header.set_size(size);
    header.set_cksum();
    header
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What was a file when it was looked at may be a FIFO by now: opening it must not wait.
const FILE: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// Where the header has a link's target.
const LINK_FIELD: usize = 157;

fn header(stat: &Stat, kind: EntryType, size: u64) -> io::Result<Header> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_size(size);
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    if matches!(kind, EntryType::Char | EntryType::Block) {
        header.set_device_major(major(stat.st_rdev))?;
        header.set_device_minor(minor(stat.st_rdev))?;
    }
    Ok(header)
}

/// Puts a name into its field, and in full into a record if it is too long.
fn name(header: &mut Header, field: usize, key: &str, name: &[u8], records: &mut Records) {
    let short = &name[..name.len().min(NAME_FIELD)];
    header.as_mut_bytes()[field..field + short.len()].copy_from_slice(short);
    if short.len() < name.len() {
        records.push((key.into(), name.to_vec()));
    }
}

/// A time as pax writes it: decimal, exact, possibly negative.
fn time(seconds: i64, nanoseconds: i64) -> Vec<u8> {
    const SECOND: i64 = 1_000_000_000;
    let text = if seconds < 0 && nanoseconds > 0 {
        format!("-{}.{:09}", -(seconds + 1), SECOND - nanoseconds)
    } else {
        format!("{seconds}.{nanoseconds:09}")
    };
    text.into_bytes()
}

/// Calls with a buffer that takes the longest answer there is.
fn answer(call: impl FnOnce(SpareCapacity<'_, u8>) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    /// XATTR_LIST_MAX and XATTR_SIZE_MAX.
    const LONGEST: usize = 64 * 1024;
    let mut buffer = Vec::with_capacity(LONGEST);
    call(spare_capacity(&mut buffer))?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    use rustix::fs::{XattrFlags, lsetxattr, makedev, mknodat};

    use super::*;

    fn archive(folder: &Path) -> Vec<u8> {
        let mut out = Vec::new();
        write(folder, None, &mut out).unwrap();
        out
    }

    /// Unpacks with GNU tar, the other party's reader.
    fn unpack(archive: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut tar = Command::new("tar")
            .args(["-xpf-", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(archive).unwrap();
        assert!(tar.wait().unwrap().success());
        dir
    }

    fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
        answer(|buffer| lgetxattr(path, name, buffer)).ok()
    }

    #[test]
    fn attributes_have_names_of_any_bytes_but_an_equals_sign() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let odd: &[u8] = b"user.\xff\xfe\n";
        for (name, length) in [(odd, 9), (&b"user.long"[..], 2000)] {
            lsetxattr(&file, name, &vec![b'v'; length], XattrFlags::empty()).unwrap();
        }
        let copy = unpack(&archive(dir.path()));
        let value = |name: &[u8]| answer(|buffer| lgetxattr(copy.path().join("file"), name, buffer));
        assert_eq!(value(odd).unwrap(), [b'v'; 9]);
        assert_eq!(value(b"user.long").unwrap(), [b'v'; 2000]);
        lsetxattr(&file, "user.a=b", b"v", XattrFlags::empty()).unwrap();
        assert!(matches!(write(dir.path(), None, io::sink()), Err(Error::Entry { .. })));
    }

    #[test]
    fn records_count_their_own_length() {
        for value in 0..1200 {
            let record = record(b"k", &vec![b'v'; value]);
            let length: usize = record
                .split(|byte| *byte == b' ')
                .next()
                .map(|digits| String::from_utf8_lossy(digits).parse().unwrap())
                .unwrap();
            assert_eq!(length, record.len());
        }
    }

    #[test]
    fn all_that_an_upper_folder_holds_comes_back_but_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("opaque")).unwrap();
        lsetxattr(at("opaque"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
        let long = "n".repeat(255);
        fs::write(at(&format!("opaque/{long}")), "long").unwrap();
        fs::write(at("file"), "content").unwrap();
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o6755)).unwrap();
        fs::hard_link(at("file"), at("second")).unwrap();
        std::os::unix::fs::lchown(at("file"), Some(3_000_000), Some(70_000)).unwrap();
        symlink("t".repeat(300), at("link")).unwrap();
        mknodat(CWD, at("gone"), FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).unwrap();
        mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();

        let copy = unpack(&archive(dir.path()));
        let new = |name: &str| copy.path().join(name);
        assert_eq!(attribute(&new("opaque"), "trusted.overlay.opaque").as_deref(), Some(&b"y"[..]));
        assert_eq!(fs::read(new(&format!("opaque/{long}"))).unwrap(), b"long");
        let (old, file) = (fs::metadata(at("file")).unwrap(), fs::metadata(new("file")).unwrap());
        assert_eq!((file.uid(), file.gid(), file.mode()), (old.uid(), old.gid(), old.mode()));
        assert_eq!((file.mtime(), file.mtime_nsec()), (old.mtime(), old.mtime_nsec()));
        assert_eq!(file.ino(), fs::metadata(new("second")).unwrap().ino());
        assert_eq!(fs::read_link(new("link")).unwrap(), fs::read_link(at("link")).unwrap());
        let gone = fs::symlink_metadata(new("gone")).unwrap();
        assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
        assert!(fs::symlink_metadata(new("fifo")).unwrap().file_type().is_fifo());
        assert!(!new("socket").exists());
    }

    #[test]
    fn what_the_upper_folder_links_is_linked_however_the_merged_view_shows_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["merged", "upper", "aside"] {
            fs::create_dir(at(folder)).unwrap();
        }
        for name in ["a", "b", "c"] {
            fs::write(at("merged").join(name), "one").unwrap();
            fs::hard_link(at("merged").join(name), at("aside").join(name)).unwrap();
        }
        fs::write(at("upper/a"), "one").unwrap();
        fs::hard_link(at("upper/a"), at("upper/b")).unwrap();
        let mut out = Vec::new();
        write(&at("merged"), Some(&at("upper")), &mut out).unwrap();
        let copy = unpack(&out);
        let inode = |name: &str| fs::metadata(copy.path().join(name)).unwrap().ino();
        assert_eq!(inode("a"), inode("b"));
        assert_ne!(inode("a"), inode("c"));
    }

    #[test]
    fn folders_may_go_deeper_than_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let mut fd = openat(CWD, dir.path(), DIRECTORY, Mode::empty()).unwrap();
        let name = CString::new("d".repeat(200)).unwrap();
        for _ in 0..30 {
            rustix::fs::mkdirat(&fd, &name, Mode::RWXU).unwrap();
            fd = openat(&fd, &name, DIRECTORY, Mode::empty()).unwrap();
        }
        let out = archive(dir.path());
        let mut read = tar::Archive::new(out.as_slice());
        let longest = read.entries().unwrap().map(|entry| entry.unwrap().path_bytes().len()).max();
        assert_eq!(longest, Some(30 * 201 - 1));
    }

    #[test]
    fn a_file_that_shrinks_keeps_its_announced_length() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), [b'x'; 10]).unwrap();
        let stat = rustix::fs::stat(dir.path().join("file")).unwrap();
        let mut archive = Archive {
            tar: Builder::new(Vec::new()),
            links: HashMap::new(),
            path: b"file".to_vec(),
            upper: None,
        };
        archive.append(&stat, EntryType::Regular, None, Vec::new(), &b"xx"[..]).unwrap();
        let out = archive.tar.into_inner().unwrap();
        let mut read = tar::Archive::new(out.as_slice());
        let mut content = Vec::new();
        read.entries().unwrap().next().unwrap().unwrap().read_to_end(&mut content).unwrap();
        assert_eq!(content, b"xx\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn times_are_exact_on_both_sides_of_the_epoch() {
        assert_eq!(time(1, 5), b"1.000000005");
        assert_eq!(time(0, 0), b"0.000000000");
        assert_eq!(time(-1, 500_000_000), b"-0.500000000");
        assert_eq!(time(-2, 250_000_000), b"-1.750000000");
        assert_eq!(time(-2, 0), b"-2.000000000");
    }
}
