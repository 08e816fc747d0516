//! Where a file of the upper folder is: the guest's hint, by which the host reads and writes it by itself.
//!
//! ```text
//!   ino:u64 shown:u64 0:u32 0xffffffff:u32 path
//! ```
//!
//! It stands where an OPEN_READ has the hint of a lower file, whose layer's number is in the place of the last
//! number, and after what the kernel expects of an OPEN or CREATE.

use super::abi::PATH_MAX;
use super::codec::{Malformed, Put, Take};

/// In the place of a lower layer's number.
const UPPER: u32 = u32::MAX;

/// A file of the upper folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpperHint<'a> {
    /// Its inode's number there.
    pub ino: u64,
    /// The number that the union shows: an overlay keeps a lower file's when that is copied up.
    pub shown: u64,
    /// Below the upper folder.
    pub path: &'a [u8],
}

impl<'a> UpperHint<'a> {
    /// Takes a whole hint.
    ///
    /// # Errors
    /// It is none, or one of a lower file.
    pub fn take(hint: &'a [u8]) -> Result<Self, Malformed> {
        let mut take = Take::new(hint);
        let (ino, shown, padding, layer) = (take.u64()?, take.u64()?, take.u32()?, take.u32()?);
        let path = take.rest();
        if layer != UPPER || padding != 0 || path.is_empty() || path.len() > PATH_MAX {
            return Err(Malformed("a place in the upper folder that is none"));
        }
        Ok(Self { ino, shown, path })
    }

    /// Appends the hint.
    pub fn put(&self, to: &mut impl Put) {
        to.u64(self.ino).u64(self.shown).u32(0).u32(UPPER).bytes(self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_hint_stay() {
        let mut bytes = Vec::new();
        UpperHint { ino: 7, shown: 9, path: b"d/f" }.put(&mut bytes);
        let golden = b"\x07\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\0\0\0\0\xff\xff\xff\xffd/f";
        assert_eq!(bytes, golden);
        assert_eq!(UpperHint::take(golden), Ok(UpperHint { ino: 7, shown: 9, path: b"d/f" }));
    }

    #[test]
    fn what_is_no_hint_is_refused() {
        let hint = |layer: u32, padding: u32, path: &[u8]| {
            let mut bytes = Vec::new();
            bytes.u64(7).u64(9).u32(padding).u32(layer).bytes(path);
            bytes
        };
        assert!(UpperHint::take(&hint(UPPER, 0, &[b'x'; PATH_MAX])).is_ok());
        for bad in [
            hint(0, 0, b"f"),
            hint(UPPER, 1, b"f"),
            hint(UPPER, 0, b""),
            hint(UPPER, 0, &[b'x'; PATH_MAX + 1]),
            vec![0; 23],
        ] {
            assert!(UpperHint::take(&bad).is_err());
        }
    }
}
