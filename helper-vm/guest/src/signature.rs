//! Cuts off a module's signature.
//!
//! ```text
//!   module | signature | 8 bytes, u32 length of the signature (big-endian) | "~Module signature appended~\n"
//! ```
//!
//! The initramfs around the modules is not signed, so checking them protects nothing; under an emulated
//! CPU each check costs some 20 ms of the guest's start. Layout: the kernel's `module_signature.h`.

const MARKER: &[u8] = b"~Module signature appended~\n";

/// Bytes of the record between signature and marker.
const RECORD: usize = 12;

/// `module` without its signature, if it has one.
pub fn strip(module: &[u8]) -> &[u8] {
    unsigned_part(module).unwrap_or(module)
}

fn unsigned_part(module: &[u8]) -> Option<&[u8]> {
    let signed = module.strip_suffix(MARKER)?;
    let length = u32::from_be_bytes(*signed.last_chunk()?);
    let tail = usize::try_from(length).ok()?.checked_add(RECORD)?;
    signed.len().checked_sub(tail).map(|end| &signed[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(module: &[u8], signature: &[u8]) -> Vec<u8> {
        let length = (signature.len() as u32).to_be_bytes();
        [module, signature, &[0; 8], &length, MARKER].concat()
    }

    #[test]
    fn a_signature_is_cut_off() {
        assert_eq!(strip(&signed(b"module", b"signature")), b"module");
        assert_eq!(strip(&signed(b"module", b"")), b"module");
    }

    #[test]
    fn an_unsigned_module_stays() {
        assert_eq!(strip(b"module"), b"module");
        assert_eq!(strip(b""), b"");
    }

    #[test]
    fn a_record_that_makes_no_sense_changes_nothing() {
        let too_long = signed(b"", b"1234")[1..].to_vec();
        let endless = [&[0xff; 12], MARKER].concat();
        for module in [too_long, endless, MARKER.to_vec()] {
            assert_eq!(strip(&module), module);
        }
    }
}
