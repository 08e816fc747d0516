//! The guest's memory as a template keeps it: the pieces that hold something, one after the other, and a list
//! that says where each belongs.
//!
//! ```text
//!   memory   |--------|AAAA|------|BB|-----------|          -: zeros, or never touched
//!   file     |AAAA|BB|                                      extents: (offset of A, length, crc32), (B ...)
//! ```
//!
//! The checksums find what storage and half-written files do, not an attacker: the files are root's. They are
//! checked while a VM's memory is copied, which reads every byte anyway.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Memory is looked at in these units.
const PAGE: usize = 4096;

/// Zeros between two pieces that are kept along rather than cut out: each piece costs a list entry and a
/// system call.
const GAP: u64 = 8 * PAGE as u64;

/// Read and written at once; small enough to stay in the CPU's cache between reading and writing.
const CHUNK: usize = 256 * 1024;

/// A piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64, u32)", into = "(u64, u64, u32)")]
pub(super) struct Extent {
    pub offset: u64,
    pub length: u64,
    pub crc32: u32,
}

impl From<(u64, u64, u32)> for Extent {
    fn from((offset, length, crc32): (u64, u64, u32)) -> Self {
        Self { offset, length, crc32 }
    }
}

impl From<Extent> for (u64, u64, u32) {
    fn from(extent: Extent) -> Self {
        (extent.offset, extent.length, extent.crc32)
    }
}

/// Where the pieces belong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Layout {
    /// Of the file: the sum of the pieces.
    pub size: u64,
    /// In ascending order, without overlap.
    pub extents: Vec<Extent>,
}

impl Layout {
    /// Says what is wrong with it for a memory of this size.
    pub(super) fn check(&self, memory: u64) -> Result<(), String> {
        let (mut end, mut sum) = (0_u64, 0_u64);
        for extent in &self.extents {
            if extent.offset < end || extent.length == 0 {
                return Err(format!("its memory's piece at {} overlaps another", extent.offset));
            }
            end = extent.offset.saturating_add(extent.length);
            sum = sum.saturating_add(extent.length);
        }
        if end > memory {
            return Err("its memory goes beyond the end of the VM's".to_owned());
        }
        if sum == self.size { Ok(()) } else { Err("its memory's pieces do not add up".to_owned()) }
    }
}

/// Memory cannot be copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the memory's piece at {0} has another checksum")]
    Checksum(u64),
}

/// Writes what `memory` holds to `file`.
pub(super) fn pack(memory: &File, file: &File) -> io::Result<Layout> {
    let size = memory.metadata()?.len();
    let mut packing = Packing { file, layout: Layout::default(), open: None };
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while let Some(start) = next_data(memory, at)? {
        // The kernel gives whole pages; a test's file need not have any.
        let start = start / PAGE as u64 * PAGE as u64;
        let end = seek(memory, SeekFrom::Hole(start.max(at)))?.min(size);
        at = start;
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            memory.read_exact_at(&mut chunk[..length], at)?;
            packing.add(&chunk[..length], at)?;
            at += length as u64;
        }
    }
    Ok(packing.layout.clone())
}

fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(start) => Ok(Some(start)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

struct Packing<'a> {
    file: &'a File,
    layout: Layout,
    open: Option<crc32fast::Hasher>,
}

impl Packing<'_> {
    fn add(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut offset = at;
        for page in bytes.chunks(PAGE) {
            if page.iter().any(|byte| *byte != 0) {
                self.keep(page, offset)?;
            }
            offset += page.len() as u64;
        }
        Ok(())
    }

    fn keep(&mut self, page: &[u8], offset: u64) -> io::Result<()> {
        match self.layout.extents.last().map(|last| offset - (last.offset + last.length)) {
            Some(gap) if gap <= GAP => self.append(&[0; GAP as usize][..gap as usize])?,
            _ => {
                self.layout.extents.push(Extent { offset, length: 0, crc32: 0 });
                self.open = Some(crc32fast::Hasher::new());
            }
        }
        self.append(page)
    }

    /// To the last extent.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.layout.size)?;
        self.layout.size += bytes.len() as u64;
        if let (Some(extent), Some(hasher)) = (self.layout.extents.last_mut(), &mut self.open) {
            hasher.update(bytes);
            extent.length += bytes.len() as u64;
            extent.crc32 = hasher.clone().finalize();
        }
        Ok(())
    }
}

/// Puts the pieces in `file` into `memory`, which holds zeros.
pub(super) fn unpack(file: &File, layout: &Layout, memory: &File) -> Result<(), CopyError> {
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    for extent in &layout.extents {
        let mut hasher = crc32fast::Hasher::new();
        let mut done = 0;
        while done < extent.length {
            let length = usize::try_from(extent.length - done).unwrap_or(CHUNK).min(CHUNK);
            file.read_exact_at(&mut chunk[..length], at + done)?;
            hasher.update(&chunk[..length]);
            memory.write_all_at(&chunk[..length], extent.offset + done)?;
            done += length as u64;
        }
        if hasher.finalize() != extent.crc32 {
            return Err(CopyError::Checksum(extent.offset));
        }
        at += extent.length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of this size with bytes at these places.
    fn memory(size: u64, pieces: &[(u64, Vec<u8>)]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in pieces {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn packed(memory: &File) -> (File, Layout) {
        let file = tempfile::tempfile().unwrap();
        let layout = pack(memory, &file).unwrap();
        (file, layout)
    }

    const SIZE: u64 = 4 << 20;

    proptest! {
        #[test]
        fn memory_comes_back_as_it_was(
            pieces in proptest::collection::vec(
                (0..SIZE - 70_000, proptest::collection::vec(any::<u8>(), 1..70_000)), 0..6)
        ) {
            let original = memory(SIZE, &pieces);
            let (file, layout) = packed(&original);
            prop_assert_eq!(layout.check(SIZE), Ok(()));
            prop_assert_eq!(file.metadata().unwrap().len(), layout.size);
            let copy = memory(SIZE, &[]);
            unpack(&file, &layout, &copy).unwrap();
            prop_assert!(contents(&copy) == contents(&original));
        }
    }

    #[test]
    fn zeros_are_not_kept() {
        let zeros = memory(SIZE, &[(0, vec![0; 1 << 20]), (2 << 20, vec![1; PAGE])]);
        let (_, layout) = packed(&zeros);
        assert_eq!(layout.size, PAGE as u64);
        assert_eq!((layout.extents.len(), layout.extents[0].offset), (1, 2 << 20));
    }

    #[test]
    fn a_changed_and_a_missing_byte_are_seen() {
        let original = memory(SIZE, &[(8192, vec![7; 300_000])]);
        let (file, layout) = packed(&original);
        file.write_all_at(&[8], 290_000).unwrap();
        let copy = memory(SIZE, &[]);
        assert!(matches!(unpack(&file, &layout, &copy), Err(CopyError::Checksum(8192))));
        file.set_len(299_999).unwrap();
        assert!(matches!(unpack(&file, &layout, &copy), Err(CopyError::Io(_))));
    }

    #[test]
    fn layouts_that_cannot_be_are_named() {
        let extent = |offset, length| Extent { offset, length, crc32: 0 };
        let layout = |size, extents| Layout { size, extents };
        for (bad, want) in [
            (layout(8, vec![extent(4, 4), extent(0, 4)]), "overlaps"),
            (layout(4, vec![extent(0, 4), extent(8, 0)]), "overlaps"),
            (layout(8, vec![extent(8, 8)]), "beyond the end"),
            (layout(u64::MAX, vec![extent(1, u64::MAX)]), "beyond the end"),
            (layout(5, vec![extent(0, 4)]), "add up"),
        ] {
            assert!(bad.check(10).unwrap_err().contains(want), "{want}");
        }
    }
}
