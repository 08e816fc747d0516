//! Compares two trees, entry by entry.
//!
//! Both come in the order of paths, so that one pass with bounded memory finds what is missing on
//! either side. Content is compared last, and not at all where both sides show the same inode: a
//! verification costs as much as the change, not as the image.

use std::cmp::Ordering;
use std::fmt;
use std::io::{self, Read};

use sha2::{Digest as _, Sha256};

use crate::layer::{Item, ItemKind, LayerReader, ReadError};
use crate::meta::{Device, Meta, Time, Xattrs};
use crate::path::{Escaped, TreePath};
use crate::upper::{Content, EntryKind, Piece, Walk, WalkError, What};

/// Why two trees cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A walk fails.
    #[error("The folders cannot be read")]
    Walk(#[from] WalkError),
    /// A stream is damaged.
    #[error("The stream cannot be read")]
    Stream(#[from] ReadError),
    /// A file cannot be read.
    #[error("{path} cannot be read")]
    Content {
        /// Which.
        path: TreePath,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A stream does not follow the order of paths.
    #[error("The stream has {0} out of order")]
    Unordered(TreePath),
}

/// A source of entries in the order of their paths.
pub enum Tree<'a> {
    /// A merged view; the walk must tell everything.
    Folders(Box<Walk<'a>>),
    /// A tar stream of a merged view, such as a guest sends.
    Stream(Box<LayerReader<Box<dyn Read + 'a>>>),
}

/// One way in which two trees differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Where.
    pub path: TreePath,
    /// How.
    pub how: How,
}

/// What differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// Only the second tree has it.
    Missing,
    /// Only the first tree has it.
    Extra,
    /// Another kind of entry, target, device number or hard link group.
    Kind(String, String),
    /// Owner, mode or time.
    Meta(Meta, Meta),
    /// These attributes.
    Xattrs(Vec<String>),
    /// The bytes.
    Content,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.how {
            How::Missing => write!(f, "{path}: missing"),
            How::Extra => write!(f, "{path}: should not be there"),
            How::Kind(one, other) => write!(f, "{path}: is {one}, should be {other}"),
            How::Meta(one, other) => write!(f, "{path}: is {}, should be {}", Shown(one), Shown(other)),
            How::Xattrs(names) => write!(f, "{path}: attributes differ: {}", names.join(", ")),
            How::Content => write!(f, "{path}: content differs"),
        }
    }
}

struct Shown<'a>(&'a Meta);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Meta { mode, uid, gid, mtime } = self.0;
        write!(f, "{mode:04o} {uid}:{gid} {}.{:09}", mtime.secs, mtime.nanos)
    }
}

/// An entry of either kind of tree.
struct Seen {
    path: TreePath,
    meta: Meta,
    xattrs: Xattrs,
    kind: Kind,
}

enum Kind {
    Dir,
    File(Bytes),
    Link(TreePath),
    Symlink(Vec<u8>),
    Char(Device),
    Block(Device),
    Fifo,
}

enum Bytes {
    Here(Content),
    Hashed([u8; 32]),
}

/// What counts as equal.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Times later than this one are equal to it.
    pub clamp: Option<i64>,
    /// Attributes of other names are ignored.
    pub attributes: fn(&[u8]) -> bool,
    /// Only what is at or beneath it.
    pub within: &'a TreePath,
}

/// Compares `is` with what `should` be; stops after `most` differences.
pub fn compare(is: Tree<'_>, should: Tree<'_>, most: usize) -> Result<Vec<Difference>, CompareError> {
    let within = &TreePath::root();
    compare_by(is, should, most, &Rules { clamp: None, attributes: |_| true, within })
}

/// The same by rules of one's own.
pub fn compare_by(
    mut is: Tree<'_>,
    mut should: Tree<'_>,
    most: usize,
    rules: &Rules<'_>,
) -> Result<Vec<Difference>, CompareError> {
    let mut differences = Vec::new();
    let within = rules.within;
    let (mut one, mut other) = (is.next(None, within)?, should.next(None, within)?);
    while differences.len() < most {
        let order = match (&one, &other) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(one), Some(other)) => one.path.cmp(&other.path),
        };
        match (order, one.take(), other.take()) {
            (Ordering::Less, Some(extra), kept) => {
                (one, other) = (is.next(Some(&extra.path), within)?, kept);
                differences.push(Difference { path: extra.path, how: How::Extra });
            }
            (Ordering::Greater, kept, Some(missing)) => {
                (one, other) = (kept, should.next(Some(&missing.path), within)?);
                differences.push(Difference { path: missing.path, how: How::Missing });
            }
            (_, Some(mut left), Some(mut right)) => {
                rules.apply(&mut left, &mut right);
                differences.extend(left.difference(&right)?);
                (one, other) = (is.next(Some(&left.path), within)?, should.next(Some(&right.path), within)?);
            }
            _ => break,
        }
    }
    Ok(differences)
}

impl Rules<'_> {
    fn apply(&self, is: &mut Seen, should: &mut Seen) {
        if let Some(clamp) = self.clamp
            && is.meta.mtime == (Time { secs: clamp, nanos: 0 })
            && should.meta.mtime.secs >= clamp
        {
            should.meta.mtime = is.meta.mtime;
        }
        // The first name of such a link is not compared, and which one carries the content is no difference.
        if let Kind::Link(first) = &should.kind
            && !first.starts_with(self.within)
            && matches!(is.kind, Kind::File(_) | Kind::Link(_))
        {
            (should.kind, should.xattrs) = (Kind::Link(TreePath::root()), is.xattrs.clone());
            is.kind = Kind::Link(TreePath::root());
        }
        for side in [is, should] {
            side.xattrs.retain(|name, _| (self.attributes)(name));
        }
    }
}

impl Tree<'_> {
    fn next(&mut self, after: Option<&TreePath>, within: &TreePath) -> Result<Option<Seen>, CompareError> {
        let seen = match self {
            Self::Folders(walk) => next_of_walk(walk, within)?,
            Self::Stream(stream) => next_of_stream(stream, within)?,
        };
        match (&seen, after) {
            (Some(seen), Some(after)) if seen.path <= *after => {
                Err(CompareError::Unordered(seen.path.clone()))
            }
            _ => Ok(seen),
        }
    }
}

fn next_of_walk(walk: &mut Walk<'_>, within: &TreePath) -> Result<Option<Seen>, CompareError> {
    while let Some(change) = walk.next_change()? {
        if !change.path.starts_with(within) {
            continue;
        }
        let (What::Entry(entry) | What::Parent(entry)) = change.what else { continue };
        let kind = match entry.kind {
            EntryKind::Dir => Kind::Dir,
            EntryKind::File(content) => Kind::File(Bytes::Here(content)),
            EntryKind::Link(first) => Kind::Link(first),
            EntryKind::Symlink(target) => Kind::Symlink(target),
            EntryKind::Char(device) => Kind::Char(device),
            EntryKind::Block(device) => Kind::Block(device),
            EntryKind::Fifo => Kind::Fifo,
        };
        return Ok(Some(Seen::new(change.path, entry.meta, entry.xattrs, kind)));
    }
    Ok(None)
}

fn next_of_stream<R: Read>(
    stream: &mut LayerReader<R>,
    within: &TreePath,
) -> Result<Option<Seen>, CompareError> {
    let Item { path, meta, xattrs, kind } = loop {
        match stream.next_item()? {
            None => return Ok(None),
            Some(item) if item.path.starts_with(within) => break item,
            Some(_) => {}
        }
    };
    let kind = match kind {
        ItemKind::Dir => Kind::Dir,
        ItemKind::File(_) => Kind::File(Bytes::Hashed(
            hash(stream).map_err(|source| CompareError::Content { path: path.clone(), source })?,
        )),
        ItemKind::Link(first) => Kind::Link(first),
        ItemKind::Symlink(target) => Kind::Symlink(target),
        ItemKind::Char(device) => Kind::Char(device),
        ItemKind::Block(device) => Kind::Block(device),
        ItemKind::Fifo => Kind::Fifo,
        // A merged view has neither; a file with such a name cannot be told from one.
        ItemKind::Whiteout | ItemKind::Opaque => return Err(CompareError::Unordered(path)),
    };
    Ok(Some(Seen::new(path, meta, xattrs, kind)))
}

impl Seen {
    /// A further name of a file has the attributes of its first: a stream tells them there only.
    fn new(path: TreePath, meta: Meta, xattrs: Xattrs, kind: Kind) -> Self {
        let xattrs = if matches!(kind, Kind::Link(_)) { Xattrs::new() } else { xattrs };
        Self { path, meta, xattrs, kind }
    }

    fn difference(&self, should: &Self) -> Result<Option<Difference>, CompareError> {
        let path = &self.path;
        let how = if !self.kind.same_shape(&should.kind) {
            Some(How::Kind(self.kind.describe(), should.kind.describe()))
        } else if self.meta != should.meta {
            Some(How::Meta(self.meta, should.meta))
        } else if self.xattrs != should.xattrs {
            Some(How::Xattrs(differing(&self.xattrs, &should.xattrs)))
        } else {
            let same = self.kind.same_content(&should.kind);
            let same = same.map_err(|source| CompareError::Content { path: path.clone(), source })?;
            (!same).then_some(How::Content)
        };
        Ok(how.map(|how| Difference { path: path.clone(), how }))
    }
}

fn differing(one: &Xattrs, other: &Xattrs) -> Vec<String> {
    let mut names: Vec<&Vec<u8>> = one.keys().chain(other.keys()).collect();
    names.sort();
    names.dedup();
    names.retain(|name| one.get(*name) != other.get(*name));
    names.into_iter().map(|name| Escaped(name).to_string()).collect()
}

impl Kind {
    fn same_shape(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dir, Self::Dir) | (Self::File(_), Self::File(_)) | (Self::Fifo, Self::Fifo) => true,
            (Self::Link(one), Self::Link(other)) => one == other,
            (Self::Symlink(one), Self::Symlink(other)) => one == other,
            (Self::Char(one), Self::Char(other)) | (Self::Block(one), Self::Block(other)) => one == other,
            _ => false,
        }
    }

    fn same_content(&self, other: &Self) -> io::Result<bool> {
        match (self, other) {
            (Self::File(Bytes::Here(one)), Self::File(Bytes::Here(other))) => one.same_bytes(other),
            (Self::File(one), Self::File(other)) => Ok(one.hash()? == other.hash()?),
            _ => Ok(true),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Dir => "a folder".into(),
            Self::File(_) => "a file".into(),
            Self::Link(first) => format!("a hard link to {first}"),
            Self::Symlink(target) => format!("a link to {}", Escaped(target)),
            Self::Char(device) => format!("character device {}:{}", device.major, device.minor),
            Self::Block(device) => format!("block device {}:{}", device.major, device.minor),
            Self::Fifo => "a named pipe".into(),
        }
    }
}

impl Bytes {
    fn hash(&self) -> io::Result<[u8; 32]> {
        match self {
            Self::Hashed(hash) => Ok(*hash),
            Self::Here(content) => hash_content(content),
        }
    }
}

fn hash_content(content: &Content) -> io::Result<[u8; 32]> {
    let mut reader = content.open()?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    while let Some(piece) = reader.next(&mut buffer)? {
        match piece {
            Piece::Data(count) => hash.update(&buffer[..count]),
            Piece::Hole(count) => drop(io::copy(&mut io::repeat(0).take(count), &mut HashSink(&mut hash))?),
        }
    }
    Ok(hash.finalize().into())
}

fn hash(content: &mut impl Read) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    io::copy(content, &mut HashSink(&mut hash))?;
    Ok(hash.finalize().into())
}

struct HashSink<'a>(&'a mut Sha256);

impl io::Write for HashSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
