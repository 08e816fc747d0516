//! How a layer is compressed, and the encoder for it.
//!
//! Invariant: the bytes depend on the input, the kind and the level only, never on the number of
//! processors or on how the input arrives.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use zstd::stream::raw::CParameter;

use super::gzip::ParallelGzip;

/// Kind and level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// The tar stream as it is.
    None,
    /// gzip, levels 1 to 12, which are libdeflate's.
    Gzip(u8),
    /// Zstandard, levels 1 to 19.
    Zstd(u8),
}

/// Smaller than zlib's level 6, which other tools use, in less time.
const GZIP_DEFAULT: u8 = 6;
const GZIP_MAX: u8 = 12;
const ZSTD_DEFAULT: u8 = 3;
/// Higher ones need windows that readers may refuse.
const ZSTD_MAX: u8 = 19;
/// Fixed, because it decides where zstd's threads cut the input.
const ZSTD_JOB: u32 = 2 << 20;

impl Default for Compression {
    fn default() -> Self {
        Self::Zstd(ZSTD_DEFAULT)
    }
}

/// Why a text names no compression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no compression; use zstd, gzip or none, with a level as in zstd:{ZSTD_DEFAULT} if wanted \
         (zstd 1 to {ZSTD_MAX}, gzip 1 to {GZIP_MAX})"
)]
pub struct CompressionError(String);

impl FromStr for Compression {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| CompressionError(text.chars().take(40).collect()))
    }
}

fn parse(text: &str) -> Option<Compression> {
    let (kind, level) = text.split_once(':').map_or((text, None), |(kind, level)| (kind, Some(level)));
    let level = |default, max| match level {
        None => Some(default),
        Some(level) => level.parse().ok().filter(|level| (1..=max).contains(level)),
    };
    match kind {
        "none" if text == "none" => Some(Compression::None),
        "gzip" => level(GZIP_DEFAULT, GZIP_MAX).map(Compression::Gzip),
        "zstd" => level(ZSTD_DEFAULT, ZSTD_MAX).map(Compression::Zstd),
        _ => None,
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Gzip(level) => write!(f, "gzip:{level}"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A compressing writer.
pub(super) enum Encoder<W: Write> {
    None(W),
    Gzip(ParallelGzip<W>),
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> Encoder<W> {
    /// Compresses to `sink` on up to `threads` further threads.
    pub(super) fn new(sink: W, compression: Compression, threads: usize) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None(sink),
            Compression::Gzip(level) => Self::Gzip(ParallelGzip::new(sink, level, threads)?),
            Compression::Zstd(level) => {
                let mut encoder = zstd::Encoder::new(sink, level.into())?;
                encoder.multithread(threads.try_into().unwrap_or(1))?;
                encoder.set_parameter(CParameter::JobSize(ZSTD_JOB))?;
                Self::Zstd(encoder)
            }
        })
    }

    pub(super) fn finish(self) -> io::Result<W> {
        match self {
            Self::None(sink) => Ok(sink),
            Self::Gzip(gzip) => gzip.finish(),
            Self::Zstd(zstd) => zstd.finish(),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(sink) => sink.write(bytes),
            Self::Gzip(gzip) => gzip.write(bytes),
            Self::Zstd(zstd) => zstd.write(bytes),
        }
    }

    /// A flush would cut the stream where the caller happens to be; [`Encoder::finish`] writes it all.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_name_kind_and_level() {
        for (text, expected) in [
            ("none", Some(Compression::None)),
            ("gzip", Some(Compression::Gzip(6))),
            ("gzip:9", Some(Compression::Gzip(9))),
            ("zstd:19", Some(Compression::Zstd(19))),
            ("zstd", Some(Compression::default())),
            ("none:1", None),
            ("gzip:13", None),
            ("zstd:0", None),
            ("zstd:", None),
            ("xz", None),
        ] {
            assert_eq!(text.parse().ok(), expected, "{text}");
            if let Some(compression) = expected {
                assert_eq!(compression.to_string().parse(), Ok(compression));
            }
        }
    }

    #[test]
    fn zstd_bytes_depend_neither_on_threads_nor_on_how_input_arrives() {
        let bytes: Vec<u8> =
            (0..20_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 27) as u8).collect();
        let encode = |threads, step| {
            let mut encoder = Encoder::new(Vec::new(), Compression::Zstd(3), threads).unwrap();
            bytes.chunks(step).for_each(|chunk| encoder.write_all(chunk).unwrap());
            encoder.finish().unwrap()
        };
        let first = encode(1, bytes.len());
        assert!(zstd::decode_all(&first[..]).unwrap() == bytes);
        for (threads, step) in [(1, 1000), (2, 513), (6, 1 << 20)] {
            assert!(encode(threads, step) == first, "{threads} threads, steps of {step}");
        }
    }
}
