//! A stored layer as a tar stream, hashed on both sides of the decompression.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use crate::digest::{DiffId, Digest, HashingReader};

const BUFFER: usize = 256 * 1024;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

type Stored<R> = BufReader<HashingReader<R>>;

enum Decoder<R: Read> {
    Plain(Stored<R>),
    Gzip(Box<MultiGzDecoder<Stored<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, Stored<R>>),
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buffer),
            Self::Gzip(source) => source.read(buffer),
            Self::Zstd(source) => source.read(buffer),
        }
    }
}

/// What a layer turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// SHA-256 as stored.
    pub digest: Digest,
    /// Bytes as stored.
    pub size: u64,
    /// SHA-256 before compression.
    pub diff_id: DiffId,
    /// Bytes before compression.
    pub bytes: u64,
}

/// The tar stream of a stored layer.
pub(super) struct Decoded<R: Read>(HashingReader<Decoder<R>>);

impl<R: Read> Decoded<R> {
    /// Finds out by the first bytes how the layer is compressed.
    pub(super) fn new(source: R) -> io::Result<Self> {
        let mut source = BufReader::with_capacity(BUFFER, HashingReader::new(source));
        let start = source.fill_buf()?;
        let decoder = if start.starts_with(&GZIP) {
            Decoder::Gzip(Box::new(MultiGzDecoder::new(source)))
        } else if start.starts_with(&ZSTD) {
            Decoder::Zstd(zstd::stream::read::Decoder::with_buffer(source)?)
        } else {
            Decoder::Plain(source)
        };
        Ok(Self(HashingReader::new(decoder)))
    }

    /// Reads what is left, at most `limit` bytes, and tells the digests.
    pub(super) fn finish(mut self, limit: u64) -> io::Result<Checked> {
        let rest = io::copy(&mut (&mut self.0).take(limit), &mut io::sink())?;
        if rest == limit {
            return Err(io::Error::other("too much follows the end of the archive"));
        }
        let (decoder, diff_id, bytes) = self.0.finish();
        let mut stored = match decoder {
            Decoder::Plain(source) => source,
            Decoder::Gzip(source) => source.into_inner(),
            Decoder::Zstd(source) => source.finish(),
        };
        if !stored.fill_buf()?.is_empty() {
            return Err(io::Error::other("something follows the compressed data"));
        }
        let (_, digest, size) = stored.into_inner().finish();
        Ok(Checked { digest, size, diff_id: DiffId(diff_id), bytes })
    }
}

impl<R: Read> Read for Decoded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}
