//! A request, taken apart, and its answer, being made.

use rustix::io::Errno;

use super::caller::Caller;
use crate::export::wire::abi::{Attr, Entry, IN_HEADER, InHeader, OUT_HEADER, OutHeader};
use crate::export::wire::codec::{Malformed, Put, Take};

/// `FUSE_EXT_GROUPS`.
const EXTENSION_GROUPS: u32 = 32;

/// A request from the host's kernel.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) header: InHeader,
    pub(super) caller: Caller,
    pub(super) body: Take<'a>,
}

impl<'a> Request<'a> {
    pub(super) fn parse(message: &'a [u8]) -> Result<Self, Malformed> {
        let mut take = Take::new(message);
        let header = InHeader::take(&mut take)?;
        let extensions = usize::from(header.extensions) * 8;
        let body = message.len().checked_sub(IN_HEADER + extensions);
        let body = take.bytes(body.ok_or(Malformed("extensions longer than the message"))?)?;
        let groups = groups(take)?;
        Ok(Self {
            header,
            caller: Caller { uid: header.uid, gid: header.gid, groups },
            body: Take::new(body),
        })
    }
}

/// The groups among a request's extensions.
fn groups(mut extensions: Take<'_>) -> Result<Vec<u32>, Malformed> {
    let mut groups = Vec::new();
    while !extensions.rest().is_empty() {
        let (size, kind) = (extensions.u32()? as usize, extensions.u32()?);
        let length = size.checked_sub(8).ok_or(Malformed("an extension shorter than its header"))?;
        let mut extension = Take::new(extensions.bytes(length)?);
        if kind == EXTENSION_GROUPS {
            for _ in 0..extension.u32()? {
                groups.push(extension.u32()?);
            }
        }
    }
    Ok(groups)
}

/// An answer: room for the header, then what the operation puts.
///
/// The memory is kept from answer to answer and never cleared: most of it is about to be read into.
#[derive(Debug, Default)]
pub(super) struct Answer {
    buffer: Vec<u8>,
    used: usize,
}

impl Put for Answer {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.room(bytes.len()).copy_from_slice(bytes);
        self
    }
}

impl Answer {
    /// Starts anew.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.room(OUT_HEADER);
    }

    /// Appends `length` bytes of whatever was there before, to be written over.
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        let start = self.used;
        self.used += length;
        if self.buffer.len() < self.used {
            self.buffer.resize(self.used, 0);
        }
        &mut self.buffer[start..self.used]
    }

    /// Takes back the last `length` bytes.
    pub(super) fn shorten(&mut self, length: usize) {
        self.used = self.used.saturating_sub(length).max(OUT_HEADER);
    }

    /// Bytes after the header.
    pub(super) fn body_len(&self) -> usize {
        self.used - OUT_HEADER
    }

    /// Writes over the eight bytes at `at` of the body, which are there.
    pub(super) fn patch_u64(&mut self, at: usize, value: u64) {
        self.buffer[OUT_HEADER + at..OUT_HEADER + at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn entry(&mut self, nodeid: u64, attr: Attr) {
        Entry { nodeid, attr }.put(self);
    }

    /// `fuse_attr_out`, without the time to remember it.
    pub(super) fn attr(&mut self, attr: &Attr) {
        self.u64(0).u64(0);
        attr.put(self);
    }

    /// `fuse_open_out`, without flags.
    pub(super) fn open(&mut self, handle: u64) {
        self.u64(handle).u64(0);
    }

    /// The finished message.
    pub(super) fn finish(&mut self, unique: u64, result: Result<(), Errno>) -> &[u8] {
        let error = match result {
            Ok(()) => 0,
            // To the kernel, ENOSYS would mean "never ask again".
            Err(Errno::NOSYS) => -Errno::OPNOTSUPP.raw_os_error(),
            Err(errno) => -errno.raw_os_error(),
        };
        if error != 0 {
            self.clear();
        }
        let mut header = Vec::with_capacity(OUT_HEADER);
        OutHeader { len: self.used as u32, error, unique }.put(&mut header);
        self.buffer[..OUT_HEADER].copy_from_slice(&header);
        &self.buffer[..self.used]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(body: &[u8], extensions: &[u8]) -> Vec<u8> {
        let mut message = Vec::new();
        let header = InHeader {
            len: (IN_HEADER + body.len() + extensions.len()) as u32,
            extensions: (extensions.len() / 8) as u16,
            uid: 7,
            ..InHeader::default()
        };
        header.put(&mut message);
        message.extend_from_slice(body);
        message.extend_from_slice(extensions);
        message
    }

    #[test]
    fn groups_are_apart_from_the_body() {
        let mut extension = Vec::new();
        extension.u32(16).u32(EXTENSION_GROUPS).u32(1).u32(99);
        let message = request(b"name\0", &extension);
        let mut request = Request::parse(&message).unwrap();
        assert_eq!(request.caller.groups, [99]);
        assert_eq!(request.body.name().unwrap(), c"name");
        request.body.end().unwrap();
    }

    #[test]
    fn extensions_that_lie_are_refused() {
        let mut too_many = Vec::new();
        too_many.u32(16).u32(EXTENSION_GROUPS).u32(3).u32(99);
        let mut too_short = Vec::new();
        too_short.u32(4).u32(EXTENSION_GROUPS);
        for extension in [too_many, too_short, vec![0xff; 8]] {
            assert!(Request::parse(&request(b"", &extension)).is_err(), "{extension:?}");
        }
        let mut header = request(b"", b"");
        header[36] = 9;
        assert!(Request::parse(&header).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes: Vec<u8>) {
            let _ = Request::parse(&bytes);
        }
    }
}
