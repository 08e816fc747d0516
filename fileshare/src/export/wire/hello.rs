//! The first words on each stream: what the host wants of it, and what the guest can do.
//!
//! ```text
//!   host → guest   "vmctrxpt" version:u32 lane:u32 features:u64 export:u32 reserved:u32      32 bytes
//!   guest → host   "vmctrxpt" version:u32 status:u32 features:u64                            24 bytes
//! ```
//!
//! `features` are INIT flags of the FUSE protocol: the host says what kernel and host can do, the guest answers
//! with the part of it that it does too. A guest that speaks another version answers with its own, so that both
//! sides can say so by name.

use super::codec::{Malformed, Put, Take};
use super::stream::{Stream, StreamError};

/// The version that this code speaks.
pub const VERSION: u32 = 3;

const MAGIC: &[u8; 8] = b"vmctrxpt";
const HOST_LENGTH: usize = 32;
const GUEST_LENGTH: usize = 24;
const WELCOME: u32 = 0;

/// What a stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// One request at a time, each answered before the next. Releases and forgets are not answered.
    Turns,
    /// Requests that may wait without limit (locks) and what takes them back; answered in any order.
    Waits,
}

/// The host's first words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The version that the host speaks.
    pub version: u32,
    /// What the stream is for.
    pub lane: Lane,
    /// What kernel and host can do.
    pub features: u64,
    /// Which of the guest's exports is meant.
    pub export: u32,
}

/// The two sides do not get along.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The stream failed.
    #[error("The export's other side did not introduce itself")]
    Stream(#[source] StreamError),
    /// Not this protocol.
    #[error("The export's other side speaks another protocol")]
    Malformed(#[source] Malformed),
    /// Another version of it.
    #[error(
        "The export's other side speaks version {0}, this one {VERSION}; use host and guest of one release"
    )]
    Version(u32),
    /// The guest has no such export.
    #[error("The guest refused the export (status {0})")]
    Refused(u32),
}

impl Hello {
    /// Says hello and hears what the guest can do.
    ///
    /// # Errors
    /// The stream fails, the other side speaks another protocol or version, or it refuses.
    pub fn greet(&self, stream: &Stream) -> Result<u64, HelloError> {
        stream.write_all(&self.encode()).map_err(HelloError::Stream)?;
        let mut answer = [0; GUEST_LENGTH];
        stream.read_exact(&mut answer).map_err(HelloError::Stream)?;
        let (version, status, features) = decode_answer(&answer).map_err(HelloError::Malformed)?;
        match (version, status) {
            (VERSION, WELCOME) => Ok(features & self.features),
            (VERSION, status) => Err(HelloError::Refused(status)),
            (other, _) => Err(HelloError::Version(other)),
        }
    }

    /// Hears the host's hello; answer it with [`Hello::welcome`] or [`Hello::refuse`].
    ///
    /// # Errors
    /// The stream fails or the other side speaks another protocol or version; a version is answered.
    pub fn hear(stream: &Stream) -> Result<Self, HelloError> {
        let mut hello = [0; HOST_LENGTH];
        stream.read_exact(&mut hello).map_err(HelloError::Stream)?;
        let hello = Self::decode(&hello).map_err(HelloError::Malformed)?;
        if hello.version == VERSION {
            return Ok(hello);
        }
        stream.write_all(&answer(WELCOME, 0)).map_err(HelloError::Stream)?;
        Err(HelloError::Version(hello.version))
    }

    /// Agrees, doing what is in `features`.
    ///
    /// # Errors
    /// The stream fails.
    pub fn welcome(&self, stream: &Stream, features: u64) -> Result<u64, HelloError> {
        let agreed = self.features & features;
        stream.write_all(&answer(WELCOME, agreed)).map_err(HelloError::Stream)?;
        Ok(agreed)
    }

    /// Declines with an error number.
    ///
    /// # Errors
    /// The stream fails.
    pub fn refuse(stream: &Stream, errno: u32) -> Result<(), HelloError> {
        stream.write_all(&answer(errno.max(1), 0)).map_err(HelloError::Stream)
    }

    fn encode(&self) -> Vec<u8> {
        let mut message = MAGIC.to_vec();
        let lane = match self.lane {
            Lane::Turns => 0,
            Lane::Waits => 1,
        };
        message.u32(self.version).u32(lane).u64(self.features).u32(self.export).u32(0);
        message
    }

    fn decode(message: &[u8]) -> Result<Self, Malformed> {
        let mut take = Take::new(message);
        check_magic(&mut take)?;
        let version = take.u32()?;
        let lane = match take.u32()? {
            0 => Lane::Turns,
            1 => Lane::Waits,
            // Another version's: refused for its version, so what it means does not matter.
            _ if version != VERSION => Lane::Turns,
            _ => return Err(Malformed("an unknown kind of lane")),
        };
        Ok(Self { version, lane, features: take.u64()?, export: take.u32()? })
    }
}

fn check_magic(take: &mut Take<'_>) -> Result<(), Malformed> {
    if take.bytes(MAGIC.len())? == MAGIC { Ok(()) } else { Err(Malformed("not an export's hello")) }
}

fn answer(status: u32, features: u64) -> Vec<u8> {
    let mut message = MAGIC.to_vec();
    message.u32(VERSION).u32(status).u64(features);
    message
}

fn decode_answer(message: &[u8]) -> Result<(u32, u32, u64), Malformed> {
    let mut take = Take::new(message);
    check_magic(&mut take)?;
    Ok((take.u32()?, take.u32()?, take.u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello { version: VERSION, lane: Lane::Waits, features: 0b110, export: 7 };

    fn talk(host: Hello, guest: impl FnOnce(&Stream) + Send) -> Result<u64, HelloError> {
        let (ours, theirs) = Stream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || guest(&theirs));
            host.greet(&ours)
        })
    }

    #[test]
    fn both_sides_agree_on_what_both_can_do() {
        let agreed = talk(HELLO, |stream| {
            let hello = Hello::hear(stream).unwrap();
            assert_eq!(hello, HELLO);
            assert_eq!(hello.welcome(stream, 0b011).unwrap(), 0b010);
        });
        assert_eq!(agreed.unwrap(), 0b010);
    }

    #[test]
    fn another_version_is_named_on_both_sides() {
        let newer = Hello { version: VERSION + 1, ..HELLO };
        let heard = talk(newer, |stream| {
            assert!(matches!(Hello::hear(stream), Err(HelloError::Version(v)) if v == VERSION + 1));
        });
        // This guest answers with its own version, which an honest newer host compares with its own.
        assert_eq!(heard.unwrap(), 0);
        let answered = talk(HELLO, |stream| {
            Hello::hear(stream).unwrap();
            let mut other = answer(WELCOME, 0);
            other[8] = 9;
            stream.write_all(&other).unwrap();
        });
        assert!(matches!(answered, Err(HelloError::Version(9))));
    }

    #[test]
    fn a_refusal_carries_its_reason() {
        let refused = talk(HELLO, |stream| {
            Hello::hear(stream).unwrap();
            Hello::refuse(stream, 2).unwrap();
        });
        assert!(matches!(refused, Err(HelloError::Refused(2))));
    }

    #[test]
    fn a_guest_cannot_add_features() {
        let agreed = talk(HELLO, |stream| {
            Hello::hear(stream).unwrap();
            stream.write_all(&answer(WELCOME, u64::MAX)).unwrap();
        });
        assert_eq!(agreed.unwrap(), HELLO.features);
    }

    #[test]
    fn the_bytes_of_version_3_stay() {
        let golden = b"vmctrxpt\x03\0\0\0\x01\0\0\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0";
        assert_eq!(HELLO.encode(), golden);
        assert_eq!(Hello::decode(golden).unwrap(), HELLO);
        assert_eq!(answer(WELCOME, 2), b"vmctrxpt\x03\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
    }
}
