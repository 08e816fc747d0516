//! What is asked of ELF files here: is it for this machine, can QEMU enter it directly (PVH), does it
//! need a dynamic loader, what does a section hold, where is a function. Reading only; a damaged file is an error.

use std::ops::Range;

use object::LittleEndian;
use object::elf::{EM_X86_64, PT_INTERP};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Object, ObjectSection, ObjectSymbol};

/// Owner and type of the ELF note that carries the 32-bit entry point of PVH boot.
/// Source: Xen's `include/public/elfnote.h`.
const XEN_NOTE: (&[u8], u32) = (b"Xen", 18);

/// The file is not an ELF file of the kind needed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// It cannot be parsed.
    #[error("It is no 64-bit little-endian ELF file")]
    Parse(#[from] object::Error),
    /// It is for another machine.
    #[error("It is an ELF file for another machine (e_machine {0}), not for x86-64")]
    Machine(u16),
}

/// A function of a relocatable file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its code, as offsets in the file.
    pub bytes: Range<usize>,
    /// Where the loader writes into it, from its beginning.
    pub relocated: Vec<Range<usize>>,
}

/// An x86-64 ELF file.
pub struct Elf<'a>(ElfFile64<'a, LittleEndian>);

impl<'a> Elf<'a> {
    pub fn parse(data: &'a [u8]) -> Result<Self, ElfError> {
        let file = ElfFile64::parse(data)?;
        match file.elf_header().e_machine(LittleEndian) {
            EM_X86_64 => Ok(Self(file)),
            other => Err(ElfError::Machine(other.0)),
        }
    }

    /// QEMU can start it in 32-bit mode at the address in its Xen note, without a boot loader.
    pub fn has_pvh_entry(&self) -> Result<bool, ElfError> {
        for segment in self.0.elf_program_headers() {
            let Some(mut notes) = segment.notes(LittleEndian, self.0.data())? else { continue };
            while let Some(note) = notes.next()? {
                if (note.name(), note.n_type(LittleEndian).0) == XEN_NOTE {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// It cannot run without a dynamic loader.
    pub fn has_interpreter(&self) -> bool {
        self.0.elf_program_headers().iter().any(|segment| segment.p_type(LittleEndian) == PT_INTERP)
    }

    /// The function called `name`, if there is one.
    pub fn function(&self, name: &str) -> Result<Option<Function>, ElfError> {
        let Some(symbol) = self.0.symbols().find(|symbol| symbol.name() == Ok(name)) else { return Ok(None) };
        let Some(section) = symbol.section_index() else { return Ok(None) };
        let section = self.0.section_by_index(section)?;
        let Some((file, _)) = section.file_range() else { return Ok(None) };
        let code = symbol.address()..symbol.address().saturating_add(symbol.size());
        let at = |address: u64| usize::try_from(address).ok();
        let within = section.relocations().filter(|(address, _)| code.contains(address));
        let written = within.filter_map(|(address, relocation)| {
            let start = at(address - code.start)?;
            Some(start..start + usize::from(relocation.size()) / 8)
        });
        let relocated = written.collect();
        let bounds = at(file.saturating_add(code.start)).zip(at(file.saturating_add(code.end)));
        Ok(bounds.map(|(start, end)| Function { bytes: start..end, relocated }))
    }

    /// The bytes of the section called `name`, if there is one.
    pub fn section(&self, name: &str) -> Result<Option<&'a [u8]>, ElfError> {
        Ok(self.0.section_by_name(name).map(|section| section.data()).transpose()?)
    }
}

#[cfg(test)]
pub mod testing {
    //! ELF files made by hand.

    /// A smallest ELF file: header, one PT_NOTE segment, one note.
    pub fn elf_with_note(owner: &[u8; 4], kind: u32) -> Vec<u8> {
        let mut elf = vec![0u8; 64 + 56];
        elf[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        elf[16..20].copy_from_slice(&[2, 0, 62, 0]); // ET_EXEC, EM_X86_64
        elf[20] = 1; // version
        elf[32] = 64; // e_phoff
        elf[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]); // e_ehsize, e_phentsize, e_phnum
        elf[64] = 4; // PT_NOTE
        elf[72] = 120; // p_offset
        elf[96] = 24; // p_filesz
        elf[112] = 4; // p_align
        for word in [4u32, 8, kind] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(owner);
        elf.extend([0; 8]);
        elf
    }
}
