//! Long streams of bytes whose loss, doubling, reordering or damage shows in a digest.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

use super::image::hex;

const BLOCK: usize = 64 * 1024;

/// What one end saw: so many bytes with this digest.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    /// Bytes.
    pub bytes: u64,
    /// SHA-256 in hex.
    pub digest: String,
}

/// Writes so many bytes, no two blocks alike; streams with different seeds differ.
///
/// # Errors
/// As the writer.
pub fn send(to: &mut impl Write, bytes: u64, seed: u64) -> io::Result<Seen> {
    let (mut block, mut hash, mut left) = (noise(seed), Sha256::new(), bytes);
    let mut number: u64 = 0;
    while left > 0 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        let part = &block[..left.min(BLOCK as u64) as usize];
        to.write_all(part)?;
        hash.update(part);
        left -= part.len() as u64;
        number += 1;
    }
    Ok(Seen { bytes, digest: hex(&hash.finalize()) })
}

/// Reads to the end.
///
/// # Errors
/// As the reader.
pub fn receive(from: &mut impl Read) -> io::Result<Seen> {
    let (mut buffer, mut hash, mut bytes) = (vec![0; BLOCK], Sha256::new(), 0);
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(Seen { bytes, digest: hex(&hash.finalize()) });
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
    }
}

/// A block that looks random: xorshift64*.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    });
    words.take(BLOCK / 8).flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree_and_damage_shows() {
        let mut wire = Vec::new();
        let sent = send(&mut wire, 200_001, 7).unwrap();
        assert_eq!(receive(&mut wire.as_slice()).unwrap(), sent);
        wire.swap(70_000, 140_000);
        assert_ne!(receive(&mut wire.as_slice()).unwrap(), sent);
        assert_ne!(send(&mut io::sink(), 200_001, 8).unwrap().digest, sent.digest);
    }
}
