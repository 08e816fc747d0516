//! Reads a layer that anybody may have made.
//!
//! Invariant: what this reader accepts means the same to every other reader. Whatever tar readers
//! disagree on (sparse forms, sizes on entries without content, unknown kinds, global records that
//! change entries) is refused by name. Headers, entries and bytes are bounded.

use std::io::{self, Read};

use super::decode::{Checked, Decoded};
use super::header::Raw;
use super::pax::{self, Records};
use super::{BLOCK, WHITEOUT, XATTR_RECORD};
use crate::meta::{Device, Meta, Time, Xattrs};
use crate::path::{Escaped, PathError, TreePath};

/// Bytes of long names and records before one entry.
const HEADERS_MAX: u64 = 1 << 20;
/// Entries of one layer.
const ENTRIES_MAX: u64 = 1 << 26;

/// Why a layer cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The source or the decompression fails.
    #[error("The layer cannot be read after {entries} entries")]
    Read {
        /// How many were fine.
        entries: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A header is damaged.
    #[error("Entry {entry} of the layer is damaged: {what}")]
    Damaged {
        /// Its position, from 1.
        entry: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Something that readers of layers disagree on.
    #[error("{path} in the layer uses {what}, which tar readers disagree on")]
    Ambiguous {
        /// Which entry.
        path: String,
        /// What it uses.
        what: &'static str,
    },
    /// A name that leads out of the tree or that no file system takes.
    #[error("The layer has an entry named {name}")]
    Path {
        /// As the layer says.
        name: String,
        /// Why not.
        #[source]
        source: PathError,
    },
    /// The layer is larger than allowed.
    #[error("The layer holds more than {0}")]
    TooLarge(&'static str),
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where; for a whiteout, what is deleted; for an opaque mark, the folder.
    pub path: TreePath,
    /// Owner, permissions, time.
    pub meta: Meta,
    /// Extended attributes.
    pub xattrs: Xattrs,
    /// What it is.
    pub kind: ItemKind,
}

/// What an entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ItemKind {
    /// A folder.
    Dir,
    /// A regular file of this size.
    File(u64),
    /// A further name of this path's inode.
    Link(TreePath),
    /// A symbolic link to these bytes.
    Symlink(Vec<u8>),
    /// A character device.
    Char(Device),
    /// A block device.
    Block(Device),
    /// A named pipe.
    Fifo,
    /// The path is deleted.
    Whiteout,
    /// Nothing of the folder's former content shows.
    Opaque,
}

/// Reads one layer entry by entry.
pub struct LayerReader<R: Read> {
    source: Decoded<R>,
    entries: u64,
    /// Content of the current entry that was not read yet, then its padding.
    left: u64,
    padding: u64,
    bytes_left: u64,
    ended: bool,
    /// Names that begin with `.wh.` are names like any other.
    literal: bool,
}

/// What precedes an entry's own header.
#[derive(Default)]
struct Extras {
    records: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> LayerReader<R> {
    /// Reads a layer, plain, gzip or Zstandard; at most `limit` bytes after decompression.
    pub fn new(source: R, limit: u64) -> Result<Self, ReadError> {
        let source = Decoded::new(source).map_err(|source| ReadError::Read { entries: 0, source })?;
        Ok(Self { source, entries: 0, left: 0, padding: 0, bytes_left: limit, ended: false, literal: false })
    }

    /// Reads an archive that is no layer but a folder as it is: no name in it means a deletion.
    pub fn literal(source: R, limit: u64) -> Result<Self, ReadError> {
        Ok(Self { literal: true, ..Self::new(source, limit)? })
    }

    /// The next entry; the content of the one before is skipped if it was not read.
    pub fn next_item(&mut self) -> Result<Option<Item>, ReadError> {
        self.skip(self.left + self.padding)?;
        (self.left, self.padding) = (0, 0);
        let mut extras = Extras::default();
        let mut budget = HEADERS_MAX;
        while let Some(block) = self.header()? {
            let raw = Raw(&block);
            let size = raw.size().ok_or(self.damaged("its size is no number"))?;
            match raw.kind() {
                b'x' => extras.records = self.records(size, &mut budget)?,
                b'g' => self.global(size, &mut budget)?,
                b'L' => extras.long_name = Some(self.long(size, &mut budget)?),
                b'K' => extras.long_link = Some(self.long(size, &mut budget)?),
                _ => return self.item(&raw, extras).map(Some),
            }
        }
        Ok(None)
    }

    /// Reads the rest and tells the digests.
    pub fn finish(mut self) -> Result<Checked, ReadError> {
        while self.next_item()?.is_some() {}
        let Self { source, entries, bytes_left, .. } = self;
        source.finish(bytes_left).map_err(|source| ReadError::Read { entries, source })
    }

    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, ReadError> {
        if self.ended {
            return Ok(None);
        }
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(ReadError::TooLarge("2^26 entries"));
        }
        let mut block = [0; BLOCK];
        match self.fill(&mut block)? {
            // Layers without an end mark are about; of a folder that is sent, half might be missing.
            0 if self.literal => return Err(self.damaged("the archive ends there without an end mark")),
            0 => self.ended = true,
            BLOCK if block == [0; BLOCK] => self.end()?,
            BLOCK if Raw(&block).is_intact() => return Ok(Some(block)),
            BLOCK => return Err(self.damaged("its checksum is wrong")),
            _ => return Err(self.damaged("it is cut off")),
        }
        Ok(None)
    }

    /// An archive ends with two blocks of zeros.
    fn end(&mut self) -> Result<(), ReadError> {
        let mut block = [0; BLOCK];
        let count = self.fill(&mut block)?;
        if block != [0; BLOCK] || !matches!(count, 0 | BLOCK) {
            return Err(self.damaged("it follows a block of zeros"));
        }
        self.ended = true;
        Ok(())
    }

    fn records(&mut self, size: u64, budget: &mut u64) -> Result<Records, ReadError> {
        let bytes = self.bytes(size, budget)?;
        pax::parse(&bytes).ok_or(self.damaged("its PAX records are malformed"))
    }

    /// Records for all following entries: harmless as long as they change nothing.
    fn global(&mut self, size: u64, budget: &mut u64) -> Result<(), ReadError> {
        let records = self.records(size, budget)?;
        match records.keys().all(|key| key == b"comment") {
            true => Ok(()),
            false => Err(self.damaged("it has global PAX records")),
        }
    }

    fn long(&mut self, size: u64, budget: &mut u64) -> Result<Vec<u8>, ReadError> {
        let mut bytes = self.bytes(size, budget)?;
        if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
            bytes.truncate(end);
        }
        Ok(bytes)
    }

    fn bytes(&mut self, size: u64, budget: &mut u64) -> Result<Vec<u8>, ReadError> {
        *budget = budget.checked_sub(size).ok_or(ReadError::TooLarge("1 MiB of headers for one entry"))?;
        let mut bytes = vec![0; size as usize];
        if self.fill(&mut bytes)? < bytes.len() {
            return Err(self.damaged("it is cut off"));
        }
        self.skip(padding(size))?;
        Ok(bytes)
    }

    fn item(&mut self, raw: &Raw<'_>, mut extras: Extras) -> Result<Item, ReadError> {
        let name = extras.records.remove(b"path".as_slice()).or(extras.long_name.take());
        let name = name.unwrap_or_else(|| raw.name());
        let path = TreePath::parse(&name)
            .map_err(|source| ReadError::Path { name: Escaped(&name).to_string(), source })?;
        let records = &extras.records;
        if records.keys().any(|key| key.starts_with(b"GNU.sparse.")) {
            return Err(ambiguous(&path, "a sparse form"));
        }
        let size = match records.get(b"size".as_slice()) {
            Some(size) => pax::decimal(size),
            None => raw.size(),
        };
        let size = size.ok_or(self.damaged("its size is no number"))?;
        let meta = self.meta(raw, records)?;
        let kind = self.kind(raw, &path, &name, size, &mut extras)?;
        (self.left, self.padding) = (size, padding(size));
        let xattrs = xattrs(extras.records);
        let item = Item { path, meta, xattrs, kind };
        if self.literal { Ok(item) } else { with_whiteouts(item) }
    }

    fn meta(&self, raw: &Raw<'_>, records: &Records) -> Result<Meta, ReadError> {
        let id = |key: &[u8], field: Option<u64>| {
            let value = records.get(key).map_or(field, |value| pax::decimal(value));
            value.and_then(|value| u32::try_from(value).ok())
        };
        let mtime = match records.get(b"mtime".as_slice()) {
            Some(text) => pax::parse_time(text),
            None => raw.mtime().map(|secs| Time { secs, nanos: 0 }),
        };
        let meta = || {
            Some(Meta {
                mode: (raw.mode()? & 0o7777) as u16,
                uid: id(b"uid", raw.uid())?,
                gid: id(b"gid", raw.gid())?,
                mtime: mtime?,
            })
        };
        meta().ok_or(self.damaged("its mode, owner or time is no number"))
    }

    fn kind(
        &self,
        raw: &Raw<'_>,
        path: &TreePath,
        name: &[u8],
        size: u64,
        extras: &mut Extras,
    ) -> Result<ItemKind, ReadError> {
        let is_file = matches!(raw.kind(), b'0' | 0 | b'7');
        if is_file && !name.ends_with(b"/") {
            return Ok(ItemKind::File(size));
        }
        if size != 0 {
            return Err(ambiguous(path, "a size for an entry without content"));
        }
        let link = extras.records.remove(b"linkpath".as_slice()).or(extras.long_link.take());
        let link = || link.unwrap_or_else(|| raw.link().to_vec());
        Ok(match raw.kind() {
            b'5' => ItemKind::Dir,
            _ if is_file => ItemKind::Dir,
            b'1' => {
                let link = link();
                let first = TreePath::parse(&link);
                let name = Escaped(&link).to_string();
                ItemKind::Link(first.map_err(|source| ReadError::Path { name, source })?)
            }
            b'2' => ItemKind::Symlink(link()),
            b'3' => ItemKind::Char(self.device(raw)?),
            b'4' => ItemKind::Block(self.device(raw)?),
            b'6' => ItemKind::Fifo,
            b'S' => return Err(ambiguous(path, "a sparse form")),
            _ => return Err(ambiguous(path, "an unknown kind of entry")),
        })
    }

    fn device(&self, raw: &Raw<'_>) -> Result<Device, ReadError> {
        let device = || {
            let (major, minor) = raw.device()?;
            // The kernel's widths: 12 and 20 bits.
            (major < 1 << 12 && minor < 1 << 20)
                .then_some(Device { major: major as u32, minor: minor as u32 })
        };
        device().ok_or(self.damaged("its device number is out of range"))
    }

    fn damaged(&self, what: &'static str) -> ReadError {
        ReadError::Damaged { entry: self.entries, what }
    }

    /// Fills the buffer as far as the source goes.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.take(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    fn take(&mut self, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let entries = self.entries;
        let count = self.source.read(buffer).map_err(|source| ReadError::Read { entries, source })?;
        self.bytes_left = self
            .bytes_left
            .checked_sub(count as u64)
            .ok_or(ReadError::TooLarge("the bytes that are allowed"))?;
        Ok(count)
    }

    fn skip(&mut self, mut count: u64) -> Result<(), ReadError> {
        let mut buffer = [0; 16 * 1024];
        while count > 0 {
            let step = count.min(buffer.len() as u64) as usize;
            match self.take(&mut buffer[..step])? {
                0 => return Err(self.damaged("its content is cut off")),
                taken => count -= taken as u64,
            }
        }
        Ok(())
    }
}

/// Reads the content of the current entry.
impl<R: Read> Read for LayerReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = self.left.min(buffer.len() as u64) as usize;
        let count = self.take(&mut buffer[..wanted]).map_err(io::Error::other)?;
        if count == 0 && wanted > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn ambiguous(path: &TreePath, what: &'static str) -> ReadError {
    ReadError::Ambiguous { path: path.to_string(), what }
}

fn xattrs(records: Records) -> Xattrs {
    let name = |key: &[u8]| key.strip_prefix(XATTR_RECORD).map(<[u8]>::to_vec);
    records.into_iter().filter_map(|(key, value)| Some((name(&key)?, value))).collect()
}

/// Tells what names that begin with `.wh.` mean.
fn with_whiteouts(item: Item) -> Result<Item, ReadError> {
    let Some(target) = item.path.name().and_then(|name| name.strip_prefix(WHITEOUT)) else { return Ok(item) };
    let folder = item.path.parent().unwrap_or_default();
    match target {
        b".wh..opq" => Ok(Item { path: folder, kind: ItemKind::Opaque, ..item }),
        b"" | b"." | b".." => Err(ambiguous(&item.path, "a whiteout of nothing")),
        _ if target.starts_with(WHITEOUT) => Err(ambiguous(&item.path, "a whiteout of a whiteout")),
        _ => Ok(Item { path: folder.join(target), kind: ItemKind::Whiteout, ..item }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::plain_header;

    #[test]
    fn files_over_8_gib_have_their_size() {
        for size in [0, 8 << 30, (8 << 30) - 1, 1 << 50] {
            let header = plain_header("large", size);
            let mut reader = LayerReader::new(&header[..], 1 << 51).unwrap();
            assert_eq!(reader.next_item().unwrap().unwrap().kind, ItemKind::File(size));
        }
    }
}
