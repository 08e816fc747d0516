//! Whether an answer of the guest answers its question, and what the kernel is told of it.
//!
//! Pure: bytes in, bytes out. Invariants of what passes:
//! 1. The length is the one that the request calls for; no more data than asked.
//! 2. A node has an ID of its own, a type, and a size that fits a file.
//! 3. Names are single components; listings are whole entries.
//! 4. Times to remember entries and attributes, and flags of open files, are the host's.

use std::time::Duration;

use super::config::{Cache, Config};
use super::question::{Question, put_u64_at};
use crate::export::wire::abi::{
    ATTR, ATTR_OUT, Attr, DIRENT, ENTRY_OUT, Entry, LISTED, NAME_MAX, NO_CAPABILITIES, OUT_HEADER, OWN_NODES,
    OutHeader, PATH_MAX, ROOT_ID, dirent_len, folders_after, op,
};
use crate::export::wire::codec::{Malformed, Put, Take, check_name};
use crate::export::wire::lent::UpperHint;

/// Errors of system calls are below: `EHWPOISON` is the last.
const LAST_ERRNO: i32 = 133;

/// The longest extended attribute, or list of their names.
const XATTR_MAX: u32 = 65_536;

/// The longest hint where a file's bytes are.
const HINT_MAX: usize = 24 + PATH_MAX;

/// Handles that the guest gives are below; those above are the host's own.
pub(super) const HANDLES: u64 = 1 << 63;

/// How long the kernel may remember, as the protocol has it: seconds and nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Remember {
    time: Duration,
    /// That a name is not there: somebody else may make it at any time, and be waited for.
    absent: Duration,
}

impl Remember {
    /// What the mount's configuration says.
    pub fn new(config: &Config) -> Self {
        // "Without limit", in a form that the kernel's arithmetic takes.
        const FOREVER: Duration = Duration::from_secs(1 << 31);
        match config.cache {
            Cache::Alone => Self { time: FOREVER, absent: FOREVER },
            Cache::For(time) => Self { time, absent: Duration::ZERO },
        }
    }

    /// `fuse_attr_out` of attributes that were checked.
    pub(super) fn attr_out(self, attr: &[u8; ATTR]) -> Vec<u8> {
        let time = Attr::take(&mut Take::new(attr)).map_or(Duration::ZERO, |attr| self.attributes(&attr));
        let mut body = Vec::with_capacity(ATTR_OUT);
        body.u64(time.as_secs()).u64(time.subsec_nanos().into()).bytes(attr);
        body
    }

    /// `fuse_attr_out` of a file of the host's own, whose attributes were checked.
    pub(super) fn attr_out_of(self, attr: &Attr) -> Vec<u8> {
        let mut body = Vec::with_capacity(ATTR_OUT);
        let time = self.attributes(attr);
        body.u64(time.as_secs()).u64(time.subsec_nanos().into());
        attr.put(&mut body);
        body
    }

    /// `fuse_entry_out` that says that there is no such name.
    pub(super) fn absent(self) -> Vec<u8> {
        let mut body = vec![0; ENTRY_OUT];
        put_times(&mut body, (self.time, Duration::ZERO));
        body
    }

    /// `fuse_entry_out` of a node of the host's own, whose attributes were checked.
    pub(super) fn entry_out(self, nodeid: u64, attr: &Attr) -> Vec<u8> {
        let mut body = Vec::with_capacity(ENTRY_OUT);
        Entry { nodeid, attr: *attr }.put(&mut body);
        put_times(&mut body, (self.time, self.attributes(attr)));
        body
    }

    /// The file's attributes are asked for each time while it has set-ID bits: the guest clears those when the
    /// file is written, which the kernel does not see.
    fn attributes(self, attr: &Attr) -> Duration {
        let set_id = attr.mode & (libc::S_ISUID | libc::S_ISGID) != 0 && attr.kind() == libc::S_IFREG;
        if set_id { Duration::ZERO } else { self.time }
    }
}

/// Checks an answer and completes it in place.
///
/// # Errors
/// It does not answer the question.
pub fn check(question: &Question, message: &mut [u8], remember: Remember) -> Result<(), Malformed> {
    let header = OutHeader::take(&mut Take::new(message))?;
    if header.len as usize != message.len() {
        return Err(Malformed("another length than announced"));
    }
    if header.unique != question.unique {
        return Err(Malformed("an answer to another request"));
    }
    let body = &mut message[OUT_HEADER..];
    match header.error {
        0 => {
            let (body, folders) = split_folders(question.opcode, body)?;
            folders.chunks_exact(ATTR).try_for_each(folder)?;
            check_body(question, body, remember)
        }
        error if !(-LAST_ERRNO..=0).contains(&error) => Err(Malformed("an error that is none")),
        error if -error == libc::ENOSYS => Err(Malformed("not knowing a request that was agreed on")),
        _ if body.is_empty() => Ok(()),
        _ => Err(Malformed("an error with a body")),
    }
}

fn check_body(question: &Question, body: &mut [u8], remember: Remember) -> Result<(), Malformed> {
    match question.opcode {
        op::LOOKUP => looked_up(body, remember),
        op::FIND => found(body, question.size, remember),
        op::MKDIR => entry(body, ENTRY_OUT, Some(libc::S_IFDIR), false, remember),
        op::SYMLINK => entry(body, ENTRY_OUT, Some(libc::S_IFLNK), false, remember),
        op::LINK => entry(body, ENTRY_OUT, None, false, remember),
        op::MKNOD => entry(body, ENTRY_OUT, Some(question.size as u32 & libc::S_IFMT), false, remember),
        op::CREATE | op::TMPFILE => {
            let (made, opening) = body.split_at_mut(body.len().min(ENTRY_OUT));
            entry(made, ENTRY_OUT, Some(libc::S_IFREG), false, remember)?;
            opened(opening)
        }
        op::GETATTR | op::SETATTR => attributes(body, remember),
        op::OPEN => opened(body),
        op::READLINK => target(body),
        op::READ => at_most(body, question.size),
        op::OPEN_READ => opened_and_read(body, question.size),
        op::READDIR => listing(body, question.size, None),
        op::READDIRPLUS => listing(body, question.size, Some(remember)),
        op::OPENDIR_READ => opened_and_listed(body, question.size, remember),
        op::WRITE | op::COPY_FILE_RANGE => written(body, question.size),
        op::STATFS => statfs(body),
        op::GETXATTR => sized(body, question.size, |_| Ok(())),
        op::LISTXATTR => sized(body, question.size, names),
        op::GETLK => lock(body),
        op::LSEEK => offset(body),
        _ => exactly(body, 0),
    }
}

/// Parts the kernel's answer from the attributes of folders that follow it.
fn split_folders(opcode: u32, body: &mut [u8]) -> Result<(&mut [u8], &mut [u8]), Malformed> {
    let at = body.len().checked_sub(folders_after(opcode) * ATTR);
    Ok(body.split_at_mut(at.ok_or(Malformed("no attributes of the folder that was changed"))?))
}

fn folder(attr: &[u8]) -> Result<(), Malformed> {
    let attr = Attr::take(&mut Take::new(attr))?;
    check_attr(&attr)?;
    if attr.kind() == libc::S_IFDIR { Ok(()) } else { Err(Malformed("a change in what is no folder")) }
}

fn exactly(body: &[u8], length: usize) -> Result<(), Malformed> {
    if body.len() == length { Ok(()) } else { Err(Malformed("another length than the request calls for")) }
}

fn at_most(body: &[u8], size: u64) -> Result<(), Malformed> {
    if body.len() as u64 <= size { Ok(()) } else { Err(Malformed("more data than asked")) }
}

fn looked_up(body: &mut [u8], remember: Remember) -> Result<(), Malformed> {
    let at = body.len().min(ENTRY_OUT);
    let (found, pure) = body.split_at_mut(at);
    entry(found, ENTRY_OUT, None, true, remember)?;
    match pure_folder(found, pure) {
        None if !pure.is_empty() => Err(Malformed("a place in the layers that is none")),
        _ => Ok(()),
    }
}

/// Where in a layer a folder lies whole: the layer, from 0, and the path.
fn pure_folder<'a>(found: &[u8], pure: &'a [u8]) -> Option<(usize, &'a [u8])> {
    let mut take = Take::new(pure);
    let (layer, padding) = (take.u32().ok()?, take.u32().ok()?);
    let is_folder = Entry::take_completed(found).is_ok_and(|entry| entry.attr.kind() == libc::S_IFDIR);
    let path = take.rest();
    let sound = is_folder && padding == 0 && !path.is_empty() && path.len() <= PATH_MAX;
    sound.then_some((layer.checked_sub(1)? as usize, path))
}

/// The same of a LOOKUP's answer that was checked.
pub(super) fn pure_part(body: &[u8]) -> Option<(usize, &[u8])> {
    let (found, pure) = body.split_at_checked(ENTRY_OUT)?;
    pure_folder(found, pure)
}

fn found(body: &mut [u8], names: u64, remember: Remember) -> Result<(), Malformed> {
    if body.len() as u64 != names.saturating_mul(ENTRY_OUT as u64) {
        return Err(Malformed("another number of files than were asked for"));
    }
    body.chunks_exact_mut(ENTRY_OUT).try_for_each(|one| entry(one, ENTRY_OUT, None, false, remember))
}

fn entry(
    body: &mut [u8],
    length: usize,
    kind: Option<u32>,
    may_lack: bool,
    remember: Remember,
) -> Result<(), Malformed> {
    exactly(body, length)?;
    let entry = Entry::take(&mut Take::new(body))?;
    let times = match entry.nodeid {
        0 if may_lack && entry.attr == Attr::default() => (remember.absent, Duration::ZERO),
        0 | ROOT_ID | OWN_NODES.. => return Err(Malformed("a node that is none, or the root")),
        _ => {
            check_attr(&entry.attr)?;
            if kind.is_some_and(|kind| kind != entry.attr.kind()) {
                return Err(Malformed("a file of another type than was made"));
            }
            (remember.time, remember.attributes(&entry.attr))
        }
    };
    put_times(body, times);
    Ok(())
}

/// Completes a `fuse_entry_out`.
fn put_times(entry: &mut [u8], (name, attributes): (Duration, Duration)) {
    put_u64_at(entry, 16, name.as_secs());
    put_u64_at(entry, 24, attributes.as_secs());
    put_u64_at(entry, 32, u64::from(name.subsec_nanos()) | u64::from(attributes.subsec_nanos()) << 32);
}

fn attributes(body: &mut [u8], remember: Remember) -> Result<(), Malformed> {
    exactly(body, ATTR_OUT)?;
    let mut take = Take::new(body);
    if (take.u64()?, take.u64()?) != (0, 0) {
        return Err(Malformed("attributes with a time to remember them"));
    }
    let attr = Attr::take(&mut take)?;
    check_attr(&attr)?;
    let time = remember.attributes(&attr);
    put_u64_at(body, 0, time.as_secs());
    put_u64_at(body, 8, time.subsec_nanos().into());
    Ok(())
}

pub(super) fn check_attr(attr: &Attr) -> Result<(), Malformed> {
    const SECOND: u32 = 1_000_000_000;
    let kinds = [
        libc::S_IFREG,
        libc::S_IFDIR,
        libc::S_IFLNK,
        libc::S_IFCHR,
        libc::S_IFBLK,
        libc::S_IFIFO,
        libc::S_IFSOCK,
    ];
    let largest = i64::MAX.cast_unsigned();
    match () {
        () if !kinds.contains(&attr.kind()) => Err(Malformed("a file of no type")),
        () if attr.mode > 0o177_777 => Err(Malformed("a mode with unknown bits")),
        () if attr.size > largest || attr.blocks > largest => Err(Malformed("a size that no file has")),
        () if [attr.atimensec, attr.mtimensec, attr.ctimensec].iter().any(|part| *part >= SECOND) => {
            Err(Malformed("a time with too many nanoseconds"))
        }
        () if attr.flags != 0 => Err(Malformed("attributes with flags")),
        () if !(attr.blksize.is_power_of_two() && (512..=1 << 26).contains(&attr.blksize)) => {
            Err(Malformed("a block size that is none"))
        }
        () => Ok(()),
    }
}

/// An open file, and where it lies if it is lent.
fn opened(body: &[u8]) -> Result<(), Malformed> {
    let mut take = Take::new(body);
    let (handle, flags, bare) = (take.u64()?, take.u32()?, take.u32()?);
    if !take.rest().is_empty() {
        UpperHint::take(take.rest())?;
    }
    match () {
        () if flags != 0 || bare & !NO_CAPABILITIES != 0 => Err(Malformed("an open file with flags")),
        () if handle == 0 || handle >= HANDLES => Err(Malformed("a handle that is none")),
        () => Ok(()),
    }
}

fn opened_and_read(body: &[u8], size: u64) -> Result<(), Malformed> {
    let mut take = Take::new(body);
    let (handle, hint, padding) = (take.u64()?, take.u32()? as usize, take.u32()?);
    if handle >= HANDLES || padding != 0 || hint > HINT_MAX {
        return Err(Malformed("a handle or hint that is none"));
    }
    take.bytes(hint)?;
    at_most(take.rest(), size)
}

fn opened_and_listed(body: &mut [u8], size: u64, remember: Remember) -> Result<(), Malformed> {
    let mut take = Take::new(body);
    let (handle, whole, entries) = (take.u64()?, take.u32()?, take.u32()? as usize);
    let (path, padding) = (take.u32()? as usize, take.u32()?);
    if handle == 0 || handle >= HANDLES || whole > 1 || path > PATH_MAX || padding != 0 {
        return Err(Malformed("a handle that is none"));
    }
    let (_, listed) = body.split_at_mut(LISTED);
    let (listed, hints) = listed.split_at_mut_checked(entries).ok_or(Malformed("entries past the end"))?;
    listing(listed, size, Some(remember))?;
    let layers = hints.len().checked_sub(path).ok_or(Malformed("a path past the end"))?;
    if layers != 0 && layers != 2 * self::entries(listed).count() {
        return Err(Malformed("hints for other entries than there are"));
    }
    Ok(())
}

/// A folder's listing, from an OPENDIR_READ that was checked.
pub(super) struct Folder<'a> {
    pub(super) guest: u64,
    pub(super) whole: bool,
    pub(super) entries: &'a [u8],
    /// Below the layers' roots.
    pub(super) path: &'a [u8],
    layers: &'a [u8],
}

impl<'a> Folder<'a> {
    pub(super) fn of(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut take = Take::new(body);
        let (guest, whole, entries) = (take.u64()?, take.u32()? == 1, take.u32()? as usize);
        let (path, _) = (take.u32()? as usize, take.u32()?);
        Ok(Self { guest, whole, entries: take.bytes(entries)?, path: take.bytes(path)?, layers: take.rest() })
    }

    /// The files that lie in a lower layer and the folders that do so whole, and which, counted from 0.
    pub(super) fn in_layers(&self) -> impl Iterator<Item = (Listed<'a>, usize)> {
        entries(self.entries).zip(self.layers()).filter_map(|(entry, layer)| Some((entry, layer?)))
    }

    /// For each entry the layer, if it is known.
    pub(super) fn layers(&self) -> impl Iterator<Item = Option<usize>> + use<'a> {
        let layers = self.layers.chunks_exact(2);
        layers.map(|layer| usize::from(u16::from_le_bytes([layer[0], layer[1]])).checked_sub(1))
    }
}

fn target(body: &[u8]) -> Result<(), Malformed> {
    match body {
        [] => Err(Malformed("an empty link")),
        _ if body.len() >= PATH_MAX => Err(Malformed("a link of more than 4095 bytes")),
        _ if body.contains(&0) => Err(Malformed("a link with a NUL")),
        _ => Ok(()),
    }
}

fn written(body: &[u8], size: u64) -> Result<(), Malformed> {
    let mut take = Take::new(body);
    let (count, padding) = (take.u32()?, take.u32()?);
    take.end()?;
    if u64::from(count) > size || padding != 0 {
        return Err(Malformed("more written than there was"));
    }
    Ok(())
}

fn statfs(body: &[u8]) -> Result<(), Malformed> {
    exactly(body, 80)?;
    let mut take = Take::new(&body[40..]);
    let (block, name, fragment) = (take.u32()?, take.u32()?, take.u32()?);
    if block == 0 || fragment == 0 || name as usize > NAME_MAX {
        return Err(Malformed("a file system of impossible measures"));
    }
    Ok(())
}

fn sized(body: &[u8], size: u64, content: fn(&[u8]) -> Result<(), Malformed>) -> Result<(), Malformed> {
    if size > 0 {
        at_most(body, size)?;
        return content(body);
    }
    let mut take = Take::new(body);
    let (length, padding) = (take.u32()?, take.u32()?);
    take.end()?;
    if length > XATTR_MAX || padding != 0 {
        Err(Malformed("an attribute of impossible length"))
    } else {
        Ok(())
    }
}

fn names(list: &[u8]) -> Result<(), Malformed> {
    let Some(names) = list.strip_suffix(&[0]) else {
        return if list.is_empty() { Ok(()) } else { Err(Malformed("a list of names without an end")) };
    };
    let legal = |name: &[u8]| !name.is_empty() && name.len() <= NAME_MAX;
    if names.split(|byte| *byte == 0).all(legal) {
        Ok(())
    } else {
        Err(Malformed("a list with no name in it"))
    }
}

fn lock(body: &[u8]) -> Result<(), Malformed> {
    let mut take = Take::new(body);
    let (start, end, kind, _pid) = (take.u64()?, take.u64()?, take.u32()?, take.u32()?);
    take.end()?;
    let kinds = [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK].map(|kind| kind as u32);
    if start > end || end > i64::MAX.cast_unsigned() || !kinds.contains(&kind) {
        return Err(Malformed("a lock of no kind or range"));
    }
    Ok(())
}

fn offset(body: &[u8]) -> Result<(), Malformed> {
    let mut take = Take::new(body);
    let offset = take.u64()?;
    take.end()?;
    if offset > i64::MAX.cast_unsigned() { Err(Malformed("a place past all files")) } else { Ok(()) }
}

/// Checks a listing; with nodes and attributes if `plus` says how long to remember them.
fn listing(body: &mut [u8], size: u64, plus: Option<Remember>) -> Result<(), Malformed> {
    at_most(body, size)?;
    let mut rest = body;
    while !rest.is_empty() {
        let length = first_entry(rest, plus)?;
        rest = rest.split_at_mut(length).1;
    }
    Ok(())
}

/// Checks the first entry of a listing and completes it; tells its length.
fn first_entry(listing: &mut [u8], plus: Option<Remember>) -> Result<usize, Malformed> {
    let entry_length = if plus.is_some() { ENTRY_OUT } else { 0 };
    let mut take = Take::new(listing);
    take.bytes(entry_length)?;
    let (_ino, offset) = (take.u64()?, take.u64()?);
    let (name, kind) = (take.u32()? as usize, take.u32()?);
    if name > NAME_MAX || kind > 15 || offset > i64::MAX.cast_unsigned() {
        return Err(Malformed("an entry with impossible numbers"));
    }
    let name = take.bytes(name)?;
    take.bytes(dirent_len(name.len()) - DIRENT - name.len())?;
    let length = listing.len() - take.rest().len();
    let dots = matches!(name, b"." | b"..");
    if !dots {
        check_name(name)?;
    }
    if let Some(remember) = plus {
        listed_node(&mut listing[..ENTRY_OUT], dots, kind, remember)?;
    }
    Ok(length)
}

/// Checks the node that a listing names; 0 leaves it to the kernel to ask.
fn listed_node(entry: &mut [u8], dots: bool, kind: u32, remember: Remember) -> Result<(), Malformed> {
    let listed = Entry::take(&mut Take::new(entry))?;
    match listed.nodeid {
        0 if listed.attr == Attr::default() => Ok(()),
        0 | ROOT_ID | OWN_NODES.. => Err(Malformed("a listing with the root, or what is nothing, in it")),
        _ if dots => Err(Malformed("a listing that names the node of . or ..")),
        _ => {
            check_attr(&listed.attr)?;
            if kind != 0 && kind != listed.attr.kind() >> 12 {
                return Err(Malformed("an entry of two types"));
            }
            put_times(entry, (remember.time, remember.attributes(&listed.attr)));
            Ok(())
        }
    }
}

/// An entry of a listing that was checked.
pub(super) struct Listed<'a> {
    pub(super) nodeid: u64,
    pub(super) attr: &'a [u8],
    pub(super) name: &'a [u8],
    /// Where the next entry is asked for.
    pub(super) next: u64,
    /// The entry's length.
    pub(super) length: usize,
}

/// The entries of a listing that was checked.
pub(super) fn entries(mut listing: &[u8]) -> impl Iterator<Item = Listed<'_>> {
    std::iter::from_fn(move || {
        let entry = first(listing)?;
        listing = listing.get(entry.length..)?;
        Some(entry)
    })
}

fn first(listing: &[u8]) -> Option<Listed<'_>> {
    let mut take = Take::new(listing);
    let nodeid = take.u64().ok()?;
    take.bytes(ENTRY_OUT - ATTR - 8).ok()?;
    let attr = take.bytes(ATTR).ok()?;
    let _ino = take.u64().ok()?;
    let next = take.u64().ok()?;
    let (name, _kind) = (take.u32().ok()? as usize, take.u32().ok()?);
    let length = ENTRY_OUT + dirent_len(name);
    Some(Listed { nodeid, attr, name: take.bytes(name).ok()?, next, length })
}
