//! Writes a layer in one pass: tar, diff ID, compression, digest.
//!
//! ```text
//! add(Change) ─> PAX records + header + content ─┬─ a thread: diff ID
//!                                                └─ Encoder (threads) ─ a thread: digest, sink
//! ```
//!
//! Invariant: equal changes give equal bytes, on any host: entries come sorted, whiteouts have fixed
//! metadata, nothing of the writing process (time, umask, processors) enters.

use std::io::{self, Write};

use super::compress::{Compression, Encoder};
use super::header::{Header, NAME_FIELD, octal_max};
use super::pax::{self, Records};
use super::{BLOCK, OPAQUE, WHITEOUT, XATTR_RECORD};
use crate::behind::Behind;
use crate::digest::{DiffId, Digest};
use crate::meta::{Device, Meta, Time, Xattrs};
use crate::path::{Escaped, TreePath};
use crate::upper::{Change, Content, Entry, EntryKind, Piece, WalkError, What};

const BUFFER: usize = 1 << 20;
/// What the common readers take of headers before one entry.
const RECORDS_MAX: usize = 1 << 20;

/// Why a layer cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The upper cannot be read.
    #[error("The changes cannot be read")]
    Walk(#[from] WalkError),
    /// A name that would mean a deletion.
    #[error("{0} has a name that begins with `.wh.`, which means a deletion in an OCI layer; rename it")]
    ReservedName(TreePath),
    /// An attribute that would mean something to whoever applies the layer.
    #[error("{path} has the attribute {name}, which belongs to overlayfs; an OCI layer cannot carry it")]
    OverlayXattr {
        /// Where.
        path: TreePath,
        /// Which.
        name: String,
    },
    /// An attribute whose name ends early in a tar header.
    #[error("{path} has the attribute {name}; an OCI layer cannot carry a name with an equals sign")]
    XattrName {
        /// Where.
        path: TreePath,
        /// Which.
        name: String,
    },
    /// Names and attributes of one entry are too long.
    #[error("{0} has a path and attributes larger than 1 MiB together, which no reader of layers takes")]
    TooLargeHeader(TreePath),
    /// The limit that the caller set.
    #[error("The layer grows beyond {limit} bytes at {path}")]
    TooLarge {
        /// The limit.
        limit: u64,
        /// Where it was exceeded.
        path: TreePath,
    },
    /// A file's content cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// Which.
        path: TreePath,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The sink fails.
    #[error("The layer cannot be written")]
    Write(#[source] io::Error),
}

/// How a layer is written.
#[derive(Debug, Clone, Copy)]
pub struct LayerOptions {
    /// Kind and level.
    pub compression: Compression,
    /// Later times become this one.
    pub clamp: Option<i64>,
    /// Uncompressed bytes at most: a sparse file may claim any size.
    pub limit: u64,
}

impl Default for LayerOptions {
    fn default() -> Self {
        Self { compression: Compression::default(), clamp: None, limit: 1 << 40 }
    }
}

/// How much was written so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Entries, whiteouts included.
    pub entries: u64,
    /// Bytes before compression.
    pub bytes: u64,
}

/// A finished layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerInfo {
    /// SHA-256 before compression.
    pub diff_id: DiffId,
    /// SHA-256 as stored.
    pub digest: Digest,
    /// Bytes as stored.
    pub size: u64,
    /// How it is compressed.
    pub compression: Compression,
    /// What is in it.
    pub totals: Totals,
}

/// Bounds the memory that compression takes: at the default levels some 45 MiB with so many.
const MOST_THREADS: usize = 6;

/// Writes one layer to `W`.
pub struct LayerWriter<W: Write> {
    /// Of what goes to the encoder.
    plain: Behind<io::Sink>,
    out: Encoder<Behind<W>>,
    bytes: u64,
    options: LayerOptions,
    entries: u64,
    buffer: Vec<u8>,
}

impl<W: Write + Send + 'static> LayerWriter<W> {
    /// Begins a layer, compressing on as many threads as there are processors, but not on more than a few.
    pub fn new(sink: W, options: LayerOptions) -> Result<Self, LayerError> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        let begin = || {
            let out = Encoder::new(Behind::new(sink)?, options.compression, threads)?;
            Ok((Behind::new(io::sink())?, out))
        };
        let (plain, out) = begin().map_err(LayerError::Write)?;
        Ok(Self { plain, out, bytes: 0, options, entries: 0, buffer: vec![0; BUFFER] })
    }

    /// How much was written so far.
    pub fn totals(&self) -> Totals {
        Totals { entries: self.entries, bytes: self.bytes }
    }

    /// Writes one statement; they must come in the order of the walk.
    /// `progress` hears of every entry and of every further mebibyte.
    pub fn add(&mut self, change: &Change, progress: &mut dyn FnMut(Totals)) -> Result<(), LayerError> {
        let Change { path, what, .. } = change;
        if path.components().any(|name| name.starts_with(WHITEOUT)) {
            return Err(LayerError::ReservedName(path.clone()));
        }
        self.entries += 1;
        progress(self.totals());
        match what {
            What::Entry(entry) | What::Parent(entry) => self.entry(path, entry, progress),
            What::Opaque => self.whiteout(&path.join(OPAQUE)),
            What::Whiteout => {
                let name = [WHITEOUT, path.name().unwrap_or_default()].concat();
                self.whiteout(&path.parent().unwrap_or_default().join(&name))
            }
        }
    }

    /// Ends the layer and gives the sink back.
    pub fn finish(mut self) -> Result<(W, LayerInfo), LayerError> {
        self.write(&[0; 2 * BLOCK])?;
        let totals = self.totals();
        let end =
            |out: Encoder<Behind<W>>, plain: Behind<io::Sink>| Ok((out.finish()?.finish()?, plain.finish()?));
        let ((sink, digest, size), (_, diff_id, _)) = end(self.out, self.plain).map_err(LayerError::Write)?;
        let compression = self.options.compression;
        Ok((sink, LayerInfo { diff_id: DiffId(diff_id), digest, size, compression, totals }))
    }

    fn whiteout(&mut self, path: &TreePath) -> Result<(), LayerError> {
        self.header(path, &Fields::new(path.as_bytes().to_vec()), &Xattrs::new())
    }

    fn entry(
        &mut self,
        path: &TreePath,
        entry: &Entry,
        progress: &mut dyn FnMut(Totals),
    ) -> Result<(), LayerError> {
        let mut fields = Fields { meta: self.clamp(entry.meta), ..Fields::new(path.as_bytes().to_vec()) };
        match &entry.kind {
            EntryKind::Dir => {
                fields.kind = b'5';
                fields.name.extend_from_slice(if path.is_root() { b"./" } else { b"/" });
            }
            EntryKind::File(content) => {
                return self.file(path, fields, content, &entry.xattrs, progress);
            }
            EntryKind::Link(first) => (fields.kind, fields.link) = (b'1', first.as_bytes()),
            EntryKind::Symlink(target) => (fields.kind, fields.link) = (b'2', target),
            EntryKind::Char(device) => (fields.kind, fields.device) = (b'3', Some(*device)),
            EntryKind::Block(device) => (fields.kind, fields.device) = (b'4', Some(*device)),
            EntryKind::Fifo => fields.kind = b'6',
        }
        self.header(path, &fields, &entry.xattrs)
    }

    fn clamp(&self, meta: Meta) -> Meta {
        let latest = self.options.clamp.map(|secs| Time { secs, nanos: 0 });
        Meta { mtime: latest.map_or(meta.mtime, |latest| meta.mtime.min(latest)), ..meta }
    }

    fn file(
        &mut self,
        path: &TreePath,
        fields: Fields<'_>,
        content: &Content,
        xattrs: &Xattrs,
        progress: &mut dyn FnMut(Totals),
    ) -> Result<(), LayerError> {
        let read = |source| LayerError::Read { path: path.clone(), source };
        let mut reader = content.open().map_err(read)?;
        let changed = || LayerError::Walk(WalkError::Changed(path.clone()));
        self.header(path, &Fields { kind: b'0', size: reader.size(), ..fields }, xattrs)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        loop {
            progress(self.totals());
            match reader.next(&mut buffer) {
                Ok(Some(Piece::Data(count))) => self.write(&buffer[..count])?,
                Ok(Some(Piece::Hole(count))) => self.zeros(count)?,
                Ok(None) => break,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(changed()),
                Err(error) => return Err(read(error)),
            }
        }
        self.buffer = buffer;
        if !reader.unchanged().map_err(read)? {
            return Err(changed());
        }
        self.zeros(reader.size().wrapping_neg() % BLOCK as u64)
    }

    fn header(&mut self, path: &TreePath, fields: &Fields<'_>, xattrs: &Xattrs) -> Result<(), LayerError> {
        let length = self.bytes.saturating_add(fields.size);
        if length > self.options.limit {
            return Err(LayerError::TooLarge { limit: self.options.limit, path: path.clone() });
        }
        let mut records = fields.records();
        add_xattrs(&mut records, path, xattrs)?;
        let records = records_entry(&records);
        if records.len() > RECORDS_MAX {
            return Err(LayerError::TooLargeHeader(path.clone()));
        }
        self.write(&records)?;
        self.write(&fields.header().encode())
    }

    fn zeros(&mut self, mut count: u64) -> Result<(), LayerError> {
        static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
        while count > 0 {
            let step = count.min(ZEROS.len() as u64);
            self.write(&ZEROS[..step as usize])?;
            count -= step;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.bytes += bytes.len() as u64;
        let written = self.out.write_all(bytes).and_then(|()| self.plain.write_all(bytes));
        written.map_err(LayerError::Write)
    }
}

/// The header of a regular file in an archive that is no layer, its records included.
pub(crate) fn plain_header(name: &str, size: u64) -> Vec<u8> {
    let fields =
        Fields { size, meta: Meta { mode: 0o644, ..NOBODY }, ..Fields::new(name.as_bytes().to_vec()) };
    let mut bytes = records_entry(&fields.records());
    bytes.extend_from_slice(&fields.header().encode());
    bytes
}

/// Records as an entry of their own; nothing if there are none.
fn records_entry(records: &Records) -> Vec<u8> {
    if records.is_empty() {
        return Vec::new();
    }
    let bytes = pax::encode(records);
    let size = bytes.len() as u64;
    let header = Header { name: b"PaxHeaders/x", kind: b'x', mode: 0o644, size, ..Header::default() };
    let mut entry = header.encode().to_vec();
    entry.extend_from_slice(&bytes);
    entry.resize(entry.len().next_multiple_of(BLOCK), 0);
    entry
}

/// What a whiteout and nothing else has.
const NOBODY: Meta = Meta { mode: 0, uid: 0, gid: 0, mtime: Time { secs: 0, nanos: 0 } };

/// An entry's values before it is known which of them fit a header.
struct Fields<'a> {
    name: Vec<u8>,
    link: &'a [u8],
    kind: u8,
    meta: Meta,
    size: u64,
    device: Option<Device>,
}

impl Fields<'_> {
    fn new(name: Vec<u8>) -> Self {
        Self { name, link: &[], kind: b'0', meta: NOBODY, size: 0, device: None }
    }

    /// What a header's fields cannot hold.
    fn records(&self) -> Records {
        let mut records = Records::new();
        let mut add = |key: &[u8], value: Vec<u8>| drop(records.insert(key.to_vec(), value));
        if self.name.len() > NAME_FIELD {
            add(b"path", self.name.clone());
        }
        if self.link.len() > NAME_FIELD {
            add(b"linkpath", self.link.to_vec());
        }
        for (key, value, field) in [
            (b"uid".as_slice(), self.meta.uid.into(), 8),
            (b"gid", self.meta.gid.into(), 8),
            (b"size", self.size, 12),
        ] {
            if value > octal_max(field) {
                add(key, value.to_string().into_bytes());
            }
        }
        let Time { secs, nanos } = self.meta.mtime;
        if nanos != 0 || u64::try_from(secs).is_ok_and(|secs| secs > octal_max(12)) || secs < 0 {
            add(b"mtime", pax::format_time(self.meta.mtime).into_bytes());
        }
        records
    }

    fn header(&self) -> Header<'_> {
        Header {
            name: &self.name,
            link: self.link,
            kind: self.kind,
            mode: self.meta.mode,
            uid: self.meta.uid.into(),
            gid: self.meta.gid.into(),
            size: self.size,
            mtime: self.meta.mtime.secs.try_into().unwrap_or(0),
            device: self.device.map(|device| (device.major, device.minor)),
        }
    }
}

fn add_xattrs(records: &mut Records, path: &TreePath, xattrs: &Xattrs) -> Result<(), LayerError> {
    for (name, value) in xattrs {
        let shown = || Escaped(name).to_string();
        if name.starts_with(b"trusted.overlay.") {
            return Err(LayerError::OverlayXattr { path: path.clone(), name: shown() });
        }
        if name.contains(&b'=') {
            return Err(LayerError::XattrName { path: path.clone(), name: shown() });
        }
        records.insert([XATTR_RECORD, name].concat(), value.clone());
    }
    Ok(())
}
