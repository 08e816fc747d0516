//! Taking numbers and names off a message, and putting them on one.
//!
//! Invariant: nothing here reads past the message it was given, whatever the bytes say.

use std::ffi::CStr;

/// The message is not what its opcode says; tells what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// What is left of a message.
#[derive(Clone, Copy, Debug)]
pub struct Take<'a>(&'a [u8]);

impl<'a> Take<'a> {
    /// Starts at the front of `message`.
    pub fn new(message: &'a [u8]) -> Self {
        Self(message)
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed("shorter than its parts"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed("shorter than its parts"))?;
        self.0 = rest;
        Ok(*taken)
    }

    /// The next number.
    ///
    /// # Errors
    /// The message ends before it does.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// The next number.
    ///
    /// # Errors
    /// The message ends before it does.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// The next number.
    ///
    /// # Errors
    /// The message ends before it does.
    pub fn i32(&mut self) -> Result<i32, Malformed> {
        Ok(i32::from_le_bytes(self.array()?))
    }

    /// The next number.
    ///
    /// # Errors
    /// The message ends before it does.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The next string, which a NUL ends.
    ///
    /// # Errors
    /// There is no NUL.
    pub fn string(&mut self) -> Result<&'a CStr, Malformed> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Malformed("a string without an end"))?;
        self.0 = &self.0[string.count_bytes() + 1..];
        Ok(string)
    }

    /// The next string, as the name of a folder's entry.
    ///
    /// # Errors
    /// There is no NUL, or it is no name of an entry.
    pub fn name(&mut self) -> Result<&'a CStr, Malformed> {
        let name = self.string()?;
        check_name(name.to_bytes())?;
        Ok(name)
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }

    /// Makes sure that nothing is left.
    ///
    /// # Errors
    /// Something is.
    pub fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("longer than its parts")) }
    }
}

/// Makes sure that a name is one component, and not `.` or `..`.
///
/// # Errors
/// It is not.
pub fn check_name(name: &[u8]) -> Result<(), Malformed> {
    match name {
        b"" => Err(Malformed("an empty name")),
        b"." | b".." => Err(Malformed("a name that is . or ..")),
        _ if name.len() > super::abi::NAME_MAX => Err(Malformed("a name of more than 255 bytes")),
        _ if name.contains(&b'/') => Err(Malformed("a name with a slash")),
        _ if name.contains(&0) => Err(Malformed("a name with a NUL")),
        _ => Ok(()),
    }
}

/// Puts numbers at the end of a message.
pub trait Put {
    /// Appends bytes.
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self;

    /// Appends a number.
    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a number.
    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a number.
    fn i32(&mut self, value: i32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a number.
    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
}

impl Put for Vec<u8> {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.extend_from_slice(bytes);
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::abi::{Attr, Entry, InHeader, OutHeader};
    use super::*;

    #[test]
    fn only_names_of_entries_pass() {
        let long = [b'x'; 256];
        for bad in [b"".as_slice(), b".", b"..", b"a/b", b"/", b"a\0b", &long] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in [b"a".as_slice(), b"...", b".a", b"\xff\n", &long[..255]] {
            check_name(good).unwrap();
        }
    }

    proptest! {
        #[test]
        fn headers_come_back(len: u32, opcode: u32, unique: u64, nodeid: u64, ids: [u32; 3], error: i32) {
            let [uid, gid, pid] = ids;
            let header = InHeader { len, opcode, unique, nodeid, uid, gid, pid, extensions: opcode as u16 };
            let mut message = Vec::new();
            header.put(&mut message);
            prop_assert_eq!(message.len(), super::super::abi::IN_HEADER);
            prop_assert_eq!(InHeader::take(&mut Take::new(&message)).unwrap(), header);

            let header = OutHeader { len, error, unique };
            let mut message = Vec::new();
            header.put(&mut message);
            prop_assert_eq!(message.len(), super::super::abi::OUT_HEADER);
            prop_assert_eq!(OutHeader::take(&mut Take::new(&message)).unwrap(), header);
        }

        #[test]
        fn entries_come_back(nodeid: u64, ino: u64, size: u64, times: [u64; 3], small: [u32; 6]) {
            let [atime, mtime, ctime] = times;
            let [mode, nlink, uid, gid, rdev, blksize] = small;
            let attr = Attr { ino, size, atime, mtime, ctime, mode, nlink, uid, gid, rdev, blksize, ..Attr::default() };
            let entry = Entry { nodeid, attr };
            let mut message = Vec::new();
            entry.put(&mut message);
            prop_assert_eq!(message.len(), super::super::abi::ENTRY_OUT);
            prop_assert_eq!(Entry::take(&mut Take::new(&message)).unwrap(), entry);
        }

        #[test]
        fn no_bytes_are_read_past_the_end(bytes: Vec<u8>) {
            let mut take = Take::new(&bytes);
            let _ = InHeader::take(&mut take);
            let _ = Entry::take(&mut take);
            let _ = take.name();
            let _ = take.bytes(usize::MAX);
            prop_assert!(take.rest().len() <= bytes.len());
        }
    }
}
