//! The distribution's kernel: release, and the ELF kernel packed inside the bzImage.
//!
//! ```text
//!   0      0x1f1          0x202          (setup_sects+1)*512
//!   | boot | setup header | setup code   | protected-mode code ...  [ payload: packed vmlinux, u32 size ]
//!                           ^ release at 0x200 + kernel_version       ^ payload_offset, payload_length
//! ```
//!
//! QEMU enters an ELF kernel directly (PVH), without the bzImage's own slow unpacking: much faster when
//! the guest's instructions are emulated. When the payload cannot be used so, the bzImage itself boots.
//! Layout: the kernel's `Documentation/arch/x86/boot.rst`.

use crate::decompress::{DecompressError, Format};
use crate::elf::Elf;
use crate::kernel::{Kernel, MAX_KERNEL, release_at};

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// First boot protocol that says where the payload is.
const PROTOCOL_WITH_PAYLOAD: u16 = 0x0208;

/// What `setup_sects` of 0 stands for, since the oldest kernels.
const DEFAULT_SETUP_SECTS: u8 = 4;

const SECTOR: usize = 512;

/// The file is no usable bzImage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BzImageError {
    /// The marks of a bzImage are missing.
    #[error("It is no Linux kernel in bzImage format (a distribution calls that file vmlinuz)")]
    NotBzImage,
    /// The header ends early or points outside the file.
    #[error("Its boot header is damaged: {0} lies outside the file")]
    Outside(&'static str),
    /// The header names no release.
    #[error("Its boot header holds no kernel release")]
    NoRelease,
    /// The payload cannot be unpacked.
    #[error("The kernel packed in it cannot be unpacked")]
    Payload(#[from] DecompressError),
    /// The payload unpacks to another size than the header of the file says.
    #[error("The kernel packed in it has {actual} bytes where {stated} are stated")]
    PayloadSize {
        /// Bytes stated at the payload's end.
        stated: u32,
        /// Bytes found.
        actual: usize,
    },
}

/// The kernel in `file`.
pub fn parse(file: Vec<u8>) -> Result<Kernel, BzImageError> {
    let header = Header::parse(&file)?;
    let release = header.release()?;
    let image = match header.unpack_vmlinux()? {
        Some(vmlinux) => vmlinux,
        None => file,
    };
    Ok(Kernel { release, image })
}

/// A file that carries the marks of a bzImage.
struct Header<'a> {
    file: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, BzImageError> {
        let marks = (file.get(BOOT_FLAG..BOOT_FLAG + 2), file.get(HEADER_MAGIC..HEADER_MAGIC + 4));
        match marks {
            (Some([0x55, 0xaa]), Some(b"HdrS")) => Ok(Self { file }),
            _ => Err(BzImageError::NotBzImage),
        }
    }

    fn release(&self) -> Result<String, BzImageError> {
        let at = usize::from(self.u16_at(KERNEL_VERSION)?) + 0x200;
        let text = self.file.get(at..).ok_or(BzImageError::Outside("the release"))?;
        release_at(text).ok_or(BzImageError::NoRelease)
    }

    /// The ELF kernel, if the payload is one that QEMU can enter directly.
    fn unpack_vmlinux(&self) -> Result<Option<Vec<u8>>, BzImageError> {
        if self.u16_at(PROTOCOL)? < PROTOCOL_WITH_PAYLOAD {
            return Ok(None);
        }
        let payload = self.payload()?;
        let Some(format) = Format::detect(payload) else { return Ok(None) };
        let image = format.unpack(payload, MAX_KERNEL)?;
        check_size(payload, &image)?;
        let bootable = Elf::parse(&image).and_then(|elf| elf.has_pvh_entry()).unwrap_or(false);
        Ok(bootable.then_some(image))
    }

    fn payload(&self) -> Result<&'a [u8], BzImageError> {
        let sectors = match self.file[SETUP_SECTS] {
            0 => DEFAULT_SETUP_SECTS,
            sectors => sectors,
        };
        let code = (usize::from(sectors) + 1) * SECTOR;
        let start = code + self.size_at(PAYLOAD_OFFSET)?;
        let end = start + self.size_at(PAYLOAD_LENGTH)?;
        self.file.get(start..end).ok_or(BzImageError::Outside("the payload"))
    }

    fn u16_at(&self, at: usize) -> Result<u16, BzImageError> {
        match self.file.get(at..at + 2) {
            Some(&[low, high]) => Ok(u16::from_le_bytes([low, high])),
            _ => Err(BzImageError::Outside("a field")),
        }
    }

    fn size_at(&self, at: usize) -> Result<usize, BzImageError> {
        let low = self.u16_at(at)?;
        let high = self.u16_at(at + 2)?;
        Ok(usize::from(low) | usize::from(high) << 16)
    }
}

/// The last four bytes of a payload state the unpacked size; gzip's own trailer is just that.
fn check_size(payload: &[u8], image: &[u8]) -> Result<(), BzImageError> {
    let stated = payload.last_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if stated as usize == image.len() {
        return Ok(());
    }
    Err(BzImageError::PayloadSize { stated, actual: image.len() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decompress::testing::pack;
    use crate::elf::testing::elf_with_note;
    use crate::kernel::MAX_RELEASE;

    const RELEASE_AT: u16 = 0x300;

    /// A bzImage of release 6.12.0-test whose payload is `payload`, as it stands.
    fn bzimage(protocol: u16, payload: &[u8]) -> Vec<u8> {
        let setup_sects = 3u8;
        let code = (usize::from(setup_sects) + 1) * SECTOR;
        let mut file = vec![0; code + 64];
        file[SETUP_SECTS] = setup_sects;
        file[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xaa]);
        file[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        file[PROTOCOL..PROTOCOL + 2].copy_from_slice(&protocol.to_le_bytes());
        file[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&RELEASE_AT.to_le_bytes());
        let release = b"6.12.0-test (builder) #1";
        let at = usize::from(RELEASE_AT) + 0x200;
        file[at..at + release.len()].copy_from_slice(release);
        file[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&64u32.to_le_bytes());
        file[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend(payload);
        file
    }

    /// `image` as the kernel's build packs it.
    fn payload(format: Format, image: &[u8]) -> Vec<u8> {
        let mut payload = pack(format, image);
        if format != Format::Gzip {
            payload.extend((image.len() as u32).to_le_bytes());
        }
        payload
    }

    #[test]
    fn a_payload_with_a_pvh_entry_is_unpacked() {
        let vmlinux = elf_with_note(b"Xen\0", 18);
        for format in [Format::Gzip, Format::Xz, Format::Zstd] {
            let kernel = parse(bzimage(0x20f, &payload(format, &vmlinux))).unwrap();
            assert_eq!(kernel.release, "6.12.0-test");
            assert_eq!(kernel.image, vmlinux, "{format:?}");
        }
    }

    #[test]
    fn a_kernel_that_cannot_be_entered_directly_stays_packed() {
        let no_pvh = payload(Format::Zstd, &elf_with_note(b"GNU\0", 18));
        let other_note = payload(Format::Zstd, &elf_with_note(b"Xen\0", 17));
        let no_elf = payload(Format::Zstd, b"no elf");
        let files = [
            bzimage(0x20f, &no_pvh),
            bzimage(0x20f, &other_note),
            bzimage(0x20f, &no_elf),
            bzimage(0x20f, b"in a format of tomorrow"),
            bzimage(0x207, &payload(Format::Zstd, &elf_with_note(b"Xen\0", 18))),
        ];
        for file in files {
            assert_eq!(parse(file.clone()).unwrap().image, file);
        }
    }

    #[test]
    fn what_is_no_kernel_is_named_so() {
        for file in [Vec::new(), b"#!/bin/sh".to_vec(), elf_with_note(b"Xen\0", 18), vec![0; 4096]] {
            assert!(matches!(parse(file), Err(BzImageError::NotBzImage)));
        }
    }

    #[test]
    fn a_header_that_points_outside_is_refused() {
        let mut far = bzimage(0x20f, b"");
        far[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        far[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(parse(far), Err(BzImageError::Outside("the payload"))));

        let mut release = bzimage(0x20f, b"");
        release[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&u16::MAX.to_le_bytes());
        assert!(matches!(parse(release), Err(BzImageError::Outside("the release"))));
    }

    #[test]
    fn a_payload_of_another_size_than_stated_is_refused() {
        let mut wrong = pack(Format::Xz, b"kernel");
        wrong.extend(7u32.to_le_bytes());
        let result = parse(bzimage(0x20f, &wrong));
        assert!(matches!(result, Err(BzImageError::PayloadSize { stated: 7, actual: 6 })));
    }

    proptest! {
        #[test]
        fn no_cut_file_passes_for_a_kernel(cut in 0usize..4000) {
            let file = bzimage(0x20f, &payload(Format::Zstd, &elf_with_note(b"Xen\0", 18)));
            prop_assume!(cut < file.len());
            prop_assert!(parse(file[..cut].to_vec()).is_err());
        }

        #[test]
        fn a_hostile_header_never_panics(noise in prop::collection::vec((0x1f1usize..0x260, any::<u8>()), 1..40)) {
            let mut file = bzimage(0x20f, &payload(Format::Zstd, &elf_with_note(b"Xen\0", 18)));
            for (at, byte) in noise {
                file[at] = byte;
            }
            if let Ok(kernel) = parse(file) {
                prop_assert!(kernel.release.len() <= MAX_RELEASE);
            }
        }
    }
}
