//! The bytes of a regular file: read with its holes, and checked not to have changed meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::beneath::Node;
use crate::meta::{InodeId, Meta, Stat};

/// A regular file that was found, not opened yet.
#[derive(Debug)]
pub struct Content {
    pub(super) node: Node,
}

impl Content {
    /// Its size when it was found.
    pub fn size(&self) -> u64 {
        self.node.stat.size
    }

    /// Which inode holds the bytes.
    pub fn id(&self) -> InodeId {
        self.node.stat.id
    }

    /// Whether both hold the same bytes.
    pub(crate) fn same_bytes(&self, other: &Self) -> io::Result<bool> {
        same_bytes(&self.node, &other.node)
    }

    /// Opens it; [`ContentReader::unchanged`] compares with how it was found.
    pub fn open(&self) -> io::Result<ContentReader> {
        self.node.open_file().map(|file| ContentReader::new(file, self.node.stat))
    }

    /// Opens it as it is now, with which [`ContentReader::unchanged`] then compares.
    pub(crate) fn open_anew(&self) -> io::Result<ContentReader> {
        let file = self.node.open_file()?;
        Ok(ContentReader::new(file, self.node.stat_again()?))
    }
}

/// A piece of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes are in the buffer.
    Data(usize),
    /// So many zeros for which no space is used.
    Hole(u64),
}

/// Reads a file from front to end.
pub struct ContentReader {
    file: File,
    position: u64,
    data_until: u64,
    before: Stat,
}

impl ContentReader {
    fn new(file: File, before: Stat) -> Self {
        // A file with storage for all of its bytes has no holes worth looking for.
        let data_until = if before.allocated >= before.size { before.size } else { 0 };
        Self { file, position: 0, data_until, before }
    }

    /// The size when it was opened: so many bytes come, unless it shrinks.
    pub fn size(&self) -> u64 {
        self.before.size
    }

    /// Owner, permissions and times when it was opened.
    pub(crate) fn meta(&self) -> Meta {
        self.before.meta
    }

    /// The next piece; `None` at the end.
    pub fn next(&mut self, buffer: &mut [u8]) -> io::Result<Option<Piece>> {
        if self.position >= self.before.size {
            return Ok(None);
        }
        if self.position >= self.data_until {
            let start = self.find_data()?;
            if start > self.position {
                let hole = start - self.position;
                self.position = start;
                return Ok(Some(Piece::Hole(hole)));
            }
        }
        self.read(buffer).map(Some)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Piece> {
        let wanted = (self.data_until - self.position).min(buffer.len() as u64) as usize;
        let count = self.file.read_at(&mut buffer[..wanted], self.position)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += count as u64;
        Ok(Piece::Data(count))
    }

    /// Copies the rest to an empty file, sharing blocks where the file system can, keeping holes.
    pub(crate) fn copy_to(&mut self, target: &File) -> io::Result<()> {
        if self.position == 0 && rustix::fs::ioctl_ficlone(target, &self.file).is_ok() {
            return Ok(());
        }
        target.set_len(self.before.size)?;
        while self.position < self.before.size {
            if self.position >= self.data_until {
                self.position = self.find_data()?;
            }
            while self.position < self.data_until {
                self.copy_some(target)?;
            }
        }
        Ok(())
    }

    fn copy_some(&mut self, target: &File) -> io::Result<()> {
        let count = (self.data_until - self.position).min(1 << 30) as usize;
        let (mut from, mut to) = (self.position, self.position);
        match rustix::fs::copy_file_range(&self.file, Some(&mut from), target, Some(&mut to), count) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(copied) => {
                self.position += copied as u64;
                Ok(())
            }
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.copy_by_hand(target),
            Err(error) => Err(error.into()),
        }
    }

    fn copy_by_hand(&mut self, target: &File) -> io::Result<()> {
        let mut buffer = vec![0; 256 * 1024];
        let at = self.position;
        match self.read(&mut buffer)? {
            Piece::Data(count) => target.write_all_at(&buffer[..count], at),
            Piece::Hole(_) => Ok(()),
        }
    }

    /// Where the next data begins; sets where it ends.
    fn find_data(&mut self) -> io::Result<u64> {
        let size = self.before.size;
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(self.position)) {
            Ok(start) => start.clamp(self.position, size),
            Err(Errno::NXIO) => size,
            Err(Errno::INVAL) => self.position,
            Err(error) => return Err(error.into()),
        };
        self.data_until = match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) => end.clamp(start, size),
            Err(Errno::NXIO | Errno::INVAL) => size,
            Err(error) => return Err(error.into()),
        };
        // A file that is written meanwhile may show an empty extent: read on, the check will tell.
        if start < size && self.data_until == start {
            self.data_until = size;
        }
        Ok(start)
    }

    /// Whether nothing touched the file since it was opened.
    pub fn unchanged(&self) -> io::Result<bool> {
        let statx = rustix::fs::statx(
            &self.file,
            c"",
            rustix::fs::AtFlags::EMPTY_PATH,
            rustix::fs::StatxFlags::BASIC_STATS,
        )?;
        Ok(Stat::from(&statx).unchanged_since(&self.before))
    }
}

/// Whether two regular files hold the same bytes; reads both at most once, and not at all if they are one.
pub(super) fn same_bytes(one: &Node, other: &Node) -> io::Result<bool> {
    if one.stat.id == other.stat.id {
        return Ok(true);
    }
    if one.stat.size != other.stat.size {
        return Ok(false);
    }
    let (one, other) = (one.open_file()?, other.open_file()?);
    let (mut left, mut right) = (vec![0; 256 * 1024], vec![0; 256 * 1024]);
    let mut position = 0;
    loop {
        let count = one.read_at(&mut left, position)?;
        if count == 0 {
            return Ok(other.read_at(&mut right[..1], position)? == 0);
        }
        match other.read_exact_at(&mut right[..count], position) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        if left[..count] != right[..count] {
            return Ok(false);
        }
        position += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    fn content(path: &std::path::Path) -> Content {
        let dir = Node::root(path.parent().unwrap()).unwrap();
        let name = path.file_name().unwrap().as_encoded_bytes();
        Content { node: dir.child(name).unwrap().unwrap() }
    }

    #[test]
    fn holes_are_told_apart_from_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let mut file = File::create(&path).unwrap();
        file.seek(io::SeekFrom::Start(1 << 20)).unwrap();
        file.write_all(b"data").unwrap();
        file.set_len(3 << 20).unwrap();
        let mut reader = content(&path).open().unwrap();
        let (mut whole, mut holes, mut buffer) = (Vec::new(), 0, [0; 999]);
        while let Some(piece) = reader.next(&mut buffer).unwrap() {
            match piece {
                Piece::Data(count) => whole.extend_from_slice(&buffer[..count]),
                Piece::Hole(count) => {
                    holes += count;
                    whole.resize(whole.len() + count as usize, 0);
                }
            }
        }
        assert!(holes >= (2 << 20), "{holes}");
        assert_eq!(whole, std::fs::read(&path).unwrap());
        assert!(reader.unchanged().unwrap());
    }

    #[test]
    fn room_that_was_never_written_is_read_as_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("roomy");
        let file = File::create(&path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 20_000).unwrap();
        file.write_all_at(b"data", 9000).unwrap();
        let mut reader = content(&path).open().unwrap();
        let (mut whole, mut buffer) = (Vec::new(), [0; 999]);
        while let Some(piece) = reader.next(&mut buffer).unwrap() {
            assert!(matches!(piece, Piece::Data(_)), "there is no hole: {piece:?}");
            if let Piece::Data(count) = piece {
                whole.extend_from_slice(&buffer[..count]);
            }
        }
        assert_eq!(whole, std::fs::read(&path).unwrap());
    }

    #[test]
    fn a_copy_keeps_bytes_and_holes() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let mut file = File::create(&path).unwrap();
        file.seek(io::SeekFrom::Start(8 << 20)).unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        file.set_len(20 << 20).unwrap();
        let copy = dir.path().join("copy");
        content(&path).open().unwrap().copy_to(&File::create(&copy).unwrap()).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&copy).unwrap());
        assert!(std::fs::metadata(&copy).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_write_or_chmod_meanwhile_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "one").unwrap();
        let reader = content(&path).open().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, "two").unwrap();
        assert!(!reader.unchanged().unwrap());
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_and_no_endless_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; 5000]).unwrap();
        let mut reader = content(&path).open().unwrap();
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        let result = reader.next(&mut [0; 100]);
        assert!(matches!(result, Err(_) | Ok(Some(Piece::Hole(_)))), "{result:?}");
    }

    #[test]
    fn bytes_are_compared_to_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            content(&path).node
        };
        let (a, b, c) = (write("a", b"xy"), write("b", b"xy"), write("c", b"xz"));
        assert!(same_bytes(&a, &b).unwrap());
        assert!(!same_bytes(&a, &c).unwrap());
        assert!(!same_bytes(&a, &write("d", b"xyz")).unwrap());
    }
}
