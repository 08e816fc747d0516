//! Takes out of overlayfs what breaks hard links on a share: the repeated question whether names still hold.
//!
//! Overlayfs remembers each file of the upper by *one* of its names. When that name is removed and another one is
//! left, it still asks the file system below whether the first name holds. A local file system is never asked; FUSE,
//! and so virtiofs, looks the name up again, does not find it, and the file's other names answer `ESTALE` from then
//! on. `git` makes each of its objects that way: link, then unlink.
//!
//! Nobody but the VM's own overlay changes what it has mounted, so the answer is known: names hold. The function that
//! asks is changed to say so:
//!
//! ```text
//!   ovl_dentry_revalidate:   f3 0f 1e fa        endbr64
//!                            e8 .. .. .. ..     call __fentry__      (ftrace wants it unchanged)
//!                            b8 01 00 00 00 c3  mov eax, 1; ret      <- instead of what was there
//! ```
//!
//! Source: `ovl_dentry_revalidate_common` in the kernel's `fs/overlayfs/super.c`, `fuse_dentry_revalidate` in
//! `fs/fuse/dir.c`.

use crate::elf::{Elf, ElfError};

/// The module that is changed.
pub const MODULE: &str = "overlay";

const FUNCTION: &str = "ovl_dentry_revalidate";
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const CALL: u8 = 0xe8;

/// Of `endbr64` and the call.
const ENTRY: usize = 9;

const RETURN_ONE: [u8; 6] = [0xb8, 1, 0, 0, 0, 0xc3];

/// Changes the module in `image`; whether it is one that this is known of. Another one stays as it is.
pub fn trust_names(image: &mut [u8]) -> Result<bool, ElfError> {
    let Some(function) = Elf::parse(image)?.function(FUNCTION)? else { return Ok(false) };
    let patched = ENTRY..ENTRY + RETURN_ONE.len();
    let fits = function.bytes.len() >= patched.end
        && !function
            .relocated
            .iter()
            .any(|written| written.end > patched.start && written.start < patched.end);
    let Some(code) = image.get_mut(function.bytes) else { return Ok(false) };
    if !fits || !code.starts_with(&ENDBR64) || code[ENDBR64.len()] != CALL {
        return Ok(false);
    }
    code[patched].copy_from_slice(&RETURN_ONE);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::testing::elf_with_note;

    #[test]
    fn a_module_without_the_function_stays_as_it_is() {
        let before = elf_with_note(b"Linx", 1);
        let mut after = before.clone();
        assert!(!trust_names(&mut after).unwrap());
        assert_eq!(after, before);
    }

    #[test]
    fn what_is_no_module_is_refused() {
        assert!(trust_names(&mut b"text".to_vec()).is_err());
    }
}
