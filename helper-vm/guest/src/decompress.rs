//! Decompression of kernel payloads and modules, chosen by the first bytes and bounded in size.
//!
//! Bytes after the end of the compressed stream are ignored: the kernel's build appends the unpacked
//! size to its payload.

use std::io::{self, Read};

use flate2::read::GzDecoder;
use liblzma::read::XzDecoder;

/// The data cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecompressError {
    /// The stream is damaged or cut short.
    #[error("The {format} data is damaged")]
    Damaged {
        /// Name of the format.
        format: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Unpacked, it would be larger than it may be.
    #[error("The {format} data unpacks to more than {limit} bytes")]
    TooLarge {
        /// Name of the format.
        format: &'static str,
        /// The bound.
        limit: u64,
    },
}

/// A compression format that distributions use for kernels and modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Gzip,
    Xz,
    Zstd,
}

impl Format {
    const ALL: [Self; 3] = [Self::Gzip, Self::Xz, Self::Zstd];

    /// The format that `data` begins like.
    pub fn detect(data: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|format| data.starts_with(format.magic()))
    }

    fn magic(self) -> &'static [u8] {
        match self {
            Self::Gzip => &[0x1f, 0x8b, 0x08],
            Self::Xz => &[0xfd, b'7', b'z', b'X', b'Z', 0],
            Self::Zstd => &[0x28, 0xb5, 0x2f, 0xfd],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    /// Unpacks the one stream at the start of `data` to at most `limit` bytes.
    pub fn unpack(self, data: &[u8], limit: u64) -> Result<Vec<u8>, DecompressError> {
        let damaged = |source| DecompressError::Damaged { format: self.name(), source };
        let mut out = Vec::new();
        // One byte more than allowed tells "too large" from "just fits".
        let mut reader = self.reader(data).map_err(damaged)?.take(limit + 1);
        reader.read_to_end(&mut out).map_err(damaged)?;
        if out.len() as u64 > limit {
            return Err(DecompressError::TooLarge { format: self.name(), limit });
        }
        Ok(out)
    }

    fn reader(self, data: &[u8]) -> io::Result<Box<dyn Read + '_>> {
        Ok(match self {
            Self::Gzip => Box::new(GzDecoder::new(data)),
            Self::Xz => Box::new(XzDecoder::new(data)),
            Self::Zstd => Box::new(zstd::Decoder::with_buffer(data)?.single_frame()),
        })
    }
}

#[cfg(test)]
pub mod testing {
    //! Compressors, the reverse of what is tested.

    use std::io::Write;

    use super::Format;

    pub fn pack(format: Format, data: &[u8]) -> Vec<u8> {
        match format {
            Format::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(data).unwrap();
                encoder.finish().unwrap()
            }
            Format::Xz => {
                let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
                encoder.write_all(data).unwrap();
                encoder.finish().unwrap()
            }
            Format::Zstd => zstd::encode_all(data, 1).unwrap(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_format() -> impl Strategy<Value = Format> {
        prop::sample::select(Format::ALL.to_vec())
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_back(format in any_format(), data: Vec<u8>, tail: Vec<u8>) {
            let mut packed = testing::pack(format, &data);
            packed.extend(tail);
            prop_assert_eq!(Format::detect(&packed), Some(format));
            prop_assert_eq!(format.unpack(&packed, data.len() as u64).unwrap(), data);
        }

        #[test]
        fn a_cut_stream_is_an_error(format in any_format(), data: Vec<u8>, cut: prop::sample::Index) {
            let packed = testing::pack(format, &data);
            let end = cut.index(packed.len());
            // An empty input is a valid empty stream to some decoders; detect() never sends one there.
            prop_assume!(end > 0);
            prop_assert!(format.unpack(&packed[..end], 1 << 20).is_err());
        }

        #[test]
        fn the_bound_holds(format in any_format(), data in prop::collection::vec(any::<u8>(), 1..5000)) {
            let packed = testing::pack(format, &data);
            let limit = data.len() as u64 - 1;
            let refused = matches!(format.unpack(&packed, limit), Err(DecompressError::TooLarge { .. }));
            prop_assert!(refused);
        }
    }
}
