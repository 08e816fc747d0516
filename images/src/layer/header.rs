//! One ustar header: 512 bytes of fields at fixed places.
//!
//! ```text
//! 0 name 100 | mode 8 | uid 8 | gid 8 | size 12 | mtime 12 | checksum 8 | type 1 | link 100 |
//! 257 "ustar\0" "00" | user 32 | group 32 | major 8 | minor 8 | prefix 155 | padding 12
//! ```
//!
//! Numbers are octal text. What does not fit a field goes into a PAX record before it, and the field
//! holds the nearest value that fits, or the first bytes of a name.

use std::ops::Range;

use super::BLOCK;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const KIND: usize = 156;
const LINK: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..265;
const MAJOR: Range<usize> = 329..337;
const MINOR: Range<usize> = 337..345;

/// The longest name that a header takes itself.
pub(super) const NAME_FIELD: usize = 100;

/// What a header says.
#[derive(Debug, Default)]
pub(super) struct Header<'a> {
    pub name: &'a [u8],
    pub link: &'a [u8],
    pub kind: u8,
    pub mode: u16,
    pub uid: u64,
    pub gid: u64,
    pub size: u64,
    pub mtime: u64,
    pub device: Option<(u32, u32)>,
}

impl Header<'_> {
    pub(super) fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        text(&mut block[NAME], self.name);
        text(&mut block[LINK], self.link);
        octal(&mut block[MODE], self.mode.into());
        octal(&mut block[UID], self.uid);
        octal(&mut block[GID], self.gid);
        octal(&mut block[SIZE], self.size);
        octal(&mut block[MTIME], self.mtime);
        block[KIND] = self.kind;
        block[MAGIC].copy_from_slice(b"ustar\x0000");
        let (major, minor) = self.device.unwrap_or_default();
        octal(&mut block[MAJOR], major.into());
        octal(&mut block[MINOR], minor.into());
        let sum = checksum(&block);
        octal(&mut block[CHECKSUM.start..CHECKSUM.end - 1], sum);
        block[CHECKSUM.end - 1] = b' ';
        block
    }
}

/// The sum of all bytes, the checksum's own counted as spaces.
pub(super) fn checksum(block: &[u8; BLOCK]) -> u64 {
    let others = block[..CHECKSUM.start].iter().chain(&block[CHECKSUM.end..]);
    others.map(|&byte| u64::from(byte)).sum::<u64>() + 8 * u64::from(b' ')
}

fn text(field: &mut [u8], value: &[u8]) {
    let count = value.len().min(field.len());
    field[..count].copy_from_slice(&value[..count]);
}

/// The largest number that `field` bytes hold: one digit less than bytes, in octal.
pub(super) fn octal_max(field: usize) -> u64 {
    (1 << (3 * (field - 1))) - 1
}

fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let mut rest = value.min(octal_max(field.len()));
    for place in field[..digits].iter_mut().rev() {
        *place = b'0' + (rest & 7) as u8;
        rest >>= 3;
    }
}

/// A header that was read.
#[derive(Debug, Clone)]
pub(super) struct Raw<'a>(pub &'a [u8; BLOCK]);

impl<'a> Raw<'a> {
    /// Whether the checksum is right.
    pub(super) fn is_intact(&self) -> bool {
        number(&self.0[CHECKSUM]) == Some(checksum(self.0))
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[KIND]
    }

    pub(super) fn is_posix(&self) -> bool {
        self.0[MAGIC].starts_with(b"ustar\0")
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let name = until_nul(&self.0[NAME]);
        let prefix = if self.is_posix() { until_nul(&self.0[345..500]) } else { &[] };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> &'a [u8] {
        until_nul(&self.0[LINK])
    }

    pub(super) fn mode(&self) -> Option<u64> {
        number(&self.0[MODE])
    }

    pub(super) fn uid(&self) -> Option<u64> {
        number(&self.0[UID])
    }

    pub(super) fn gid(&self) -> Option<u64> {
        number(&self.0[GID])
    }

    pub(super) fn size(&self) -> Option<u64> {
        number(&self.0[SIZE])
    }

    pub(super) fn mtime(&self) -> Option<i64> {
        signed(&self.0[MTIME])
    }

    pub(super) fn device(&self) -> Option<(u64, u64)> {
        Some((number(&self.0[MAJOR])?, number(&self.0[MINOR])?))
    }
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn number(field: &[u8]) -> Option<u64> {
    signed(field)?.try_into().ok()
}

/// Octal text, or GNU's binary form: the first bit set, two's complement, big-endian.
fn signed(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 == 0 {
        return parse_octal(field);
    }
    let negative = field[0] & 0x40 != 0;
    let mut value: i128 = if negative { -1 } else { 0 };
    let first = if negative { field[0] } else { field[0] & 0x7f };
    for &byte in std::iter::once(&first).chain(&field[1..]) {
        value = value << 8 | i128::from(byte);
    }
    value.try_into().ok()
}

fn parse_octal(field: &[u8]) -> Option<i64> {
    let digits = until_nul(field).trim_ascii();
    let digit = |value: i64, byte: &u8| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    };
    digits.iter().try_fold(0, digit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_encoded_is_read_back(
            name in proptest::collection::vec(1u8.., 1..100), mode in 0u16..0o10000, uid in 0u64..(1 << 21),
            size in 0u64..(1 << 33), mtime in 0u64..(1 << 33), device in (0u32..4096, 0u32..(1 << 20)),
        ) {
            let header = Header { name: &name, kind: b'0', mode, uid, gid: 7, size, mtime, device: Some(device), ..Header::default() };
            let block = header.encode();
            let raw = Raw(&block);
            prop_assert!(raw.is_intact() && raw.is_posix());
            prop_assert_eq!(raw.name(), name);
            prop_assert_eq!(raw.mode(), Some(mode.into()));
            prop_assert_eq!((raw.uid(), raw.gid(), raw.size()), (Some(uid), Some(7), Some(size)));
            prop_assert_eq!(raw.mtime(), Some(mtime as i64));
            prop_assert_eq!(raw.device(), Some((device.0.into(), device.1.into())));
        }
    }

    #[test]
    fn binary_numbers_are_read() {
        assert_eq!(signed(&[0x80, 0, 0, 0, 0, 0, 1, 2]), Some(258));
        assert_eq!(signed(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0xff; 12]), None);
        assert_eq!(signed(&[0x80, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(signed(b"12x\0"), None);
        assert_eq!(signed(b" 17 \0\0"), Some(15));
    }
}
