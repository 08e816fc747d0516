//! The kernel that guests boot, from the file that a distribution or a kernel build leaves: a bzImage
//! (`vmlinuz`), or the uncompressed ELF file (`vmlinux`) that is packed inside one.

use std::io;
use std::path::Path;

use crate::bzimage::{self, BzImageError};
use crate::elf::{Elf, ElfError};

/// More than any kernel takes; keeps a file that is none from filling memory.
pub const MAX_KERNEL: u64 = 512 << 20;

/// Longest release that `uname` can hold.
pub const MAX_RELEASE: usize = 64;

/// What the kernel prints first, in its read-only data.
const BANNER: &[u8] = b"Linux version ";

/// The file is no usable kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// It cannot be read.
    #[error("It cannot be read")]
    Read(#[from] io::Error),
    /// It is larger than a kernel can be.
    #[error("It has {0} bytes; no kernel has more than {MAX_KERNEL}")]
    TooLarge(u64),
    /// It is not a good bzImage.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// It is not a good ELF file.
    #[error("It is an ELF file, but no kernel for this machine")]
    Elf(#[from] ElfError),
    /// QEMU cannot start it.
    #[error("It is an ELF file without a PVH entry; a kernel has one if built with CONFIG_PVH")]
    NoPvhEntry,
    /// It does not say which release it is.
    #[error("It is an ELF file that holds no \"Linux version\"")]
    NoRelease,
}

/// A kernel, ready to boot.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// ELF with a PVH entry, or the bzImage.
    pub image: Vec<u8>,
}

/// Reads the kernel in the file at `path`.
pub fn load(path: &Path) -> Result<Kernel, KernelError> {
    let size = std::fs::metadata(path)?.len();
    if size > MAX_KERNEL {
        return Err(KernelError::TooLarge(size));
    }
    parse(std::fs::read(path)?)
}

fn parse(file: Vec<u8>) -> Result<Kernel, KernelError> {
    if file.starts_with(b"\x7fELF") { parse_elf(file) } else { Ok(bzimage::parse(file)?) }
}

fn parse_elf(file: Vec<u8>) -> Result<Kernel, KernelError> {
    if !Elf::parse(&file)?.has_pvh_entry()? {
        return Err(KernelError::NoPvhEntry);
    }
    let release = banner_release(&file).ok_or(KernelError::NoRelease)?;
    Ok(Kernel { release, image: file })
}

/// The word after the first banner that has one.
fn banner_release(file: &[u8]) -> Option<String> {
    let banners = file.windows(BANNER.len()).enumerate().filter(|(_, window)| *window == BANNER);
    banners.map(|(at, _)| at + BANNER.len()).find_map(|at| release_at(&file[at..]))
}

/// The release at the start of `text`: a word that begins with a digit.
pub fn release_at(text: &[u8]) -> Option<String> {
    let word = text.iter().take(MAX_RELEASE + 1).take_while(|byte| byte.is_ascii_graphic());
    let release: String = word.map(|&byte| char::from(byte)).collect();
    let sound = release.starts_with(|first: char| first.is_ascii_digit()) && release.len() <= MAX_RELEASE;
    sound.then_some(release)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::testing::elf_with_note;

    fn elf(note: u32, text: &str) -> Vec<u8> {
        [elf_with_note(b"Xen\0", note), text.as_bytes().to_vec()].concat()
    }

    #[test]
    fn an_elf_kernel_is_taken_as_it_is() {
        let file = elf(18, "\0Linux version %s\0Linux version 6.12.0-own (me@here) #1\0");
        let kernel = parse(file.clone()).unwrap();
        assert_eq!((kernel.release.as_str(), kernel.image), ("6.12.0-own", file));
    }

    #[test]
    fn an_elf_file_that_is_no_kernel_says_why() {
        assert!(matches!(parse(elf(17, "Linux version 6.12.0 ")), Err(KernelError::NoPvhEntry)));
        assert!(matches!(parse(elf(18, "Linux version unknown")), Err(KernelError::NoRelease)));
        assert!(matches!(parse(b"\x7fELF".to_vec()), Err(KernelError::Elf(_))));
    }

    #[test]
    fn a_release_is_one_word_that_fits_uname() {
        assert_eq!(release_at(b"6.1.0-9-amd64 (x)"), Some("6.1.0-9-amd64".to_owned()));
        assert_eq!(release_at(&[b'6'; MAX_RELEASE]), Some("6".repeat(MAX_RELEASE)));
        for text in [&[b'6'; MAX_RELEASE + 1][..], b"", b" 6.1", b"\xff", b"six"] {
            assert_eq!(release_at(text), None);
        }
    }
}
