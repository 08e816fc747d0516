//! Listing folders, with what the host will ask next: each entry comes with its node and attributes.
//!
//! A folder is opened and listed in one request, so that a folder of usual size costs one turn on the stream, not
//! three. Which nodes the host was told of that way is for the host to count, and to forget when its kernel does
//! not ask for them.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::{MutexGuard, PoisonError};

use rustix::fs::{FileType, OFlags, RawDir, RawDirEntry, SeekFrom};
use rustix::io::Errno;

use super::handles::Handle;
use super::layers::Parts;
use super::message::{Answer, Request};
use super::server::{Failure, Server};
use crate::export::wire::abi::{Attr, ENTRY_OUT, LISTED, MAX_DATA, dirent_len};
use crate::export::wire::codec::Put;

/// What is read of a folder with one system call.
const BATCH: usize = 32 * 1024;

/// Whether an answer holds the whole rest of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Here,
    Further,
}

/// Where the layers have a folder, and for each of its entries the layer that it lies in.
type Hints<'a> = Option<(&'a Parts, Vec<u16>)>;

impl Server {
    pub(super) fn opendir_read(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let size = request.body.u32()?.min(MAX_DATA) as usize;
        request.body.u32()?;
        request.body.end()?;
        let node = self.nodes.find(request.header.nodeid)?;
        let file = self.room.with(|| node.open(OFlags::RDONLY | OFlags::DIRECTORY))?;
        let parts = self.layers.as_ref().and_then(|layers| layers.parts(&self.root, &node));
        let handle = Handle::new(node, file, false);
        answer.bytes(&[0; LISTED]);
        let mut hints = parts.as_ref().map(|parts| (parts, Vec::new()));
        let list = || {
            // Anew, if it ended for want of room.
            answer.shorten(answer.body_len() - LISTED);
            hints.iter_mut().for_each(|(_, layers)| layers.clear());
            self.list(&handle, 0, size, Some(&mut hints), answer)
        };
        let rest = self.room.with(list)?;
        let entries = answer.body_len() - LISTED;
        let path = put_hints(hints, answer);
        answer.patch_u64(0, self.handles.add(handle));
        answer.patch_u64(8, u64::from(rest == Rest::Here) | (entries as u64) << 32);
        answer.patch_u64(16, path as u64);
        Ok(())
    }

    pub(super) fn readdir(
        &self,
        request: &mut Request<'_>,
        answer: &mut Answer,
        plus: bool,
    ) -> Result<(), Failure> {
        let body = &mut request.body;
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        body.bytes(20)?;
        body.end()?;
        let handle = self.handles.find(handle, request.header.nodeid)?;
        let plus = if plus { Some(&mut None) } else { None };
        self.list(&handle, offset, size.min(MAX_DATA) as usize, plus, answer)?;
        Ok(())
    }

    /// Appends entries from `offset` on, `size` bytes at most; with nodes if there is a place for hints.
    fn list(
        &self,
        handle: &Handle,
        offset: u64,
        size: usize,
        mut plus: Option<&mut Hints<'_>>,
        answer: &mut Answer,
    ) -> rustix::io::Result<Rest> {
        let mut position = handle.position.lock().unwrap_or_else(PoisonError::into_inner);
        let file = handle.file(&self.room)?;
        let limit = answer.body_len() + size;
        let mut buffer = Vec::with_capacity(BATCH);
        let mut next = offset;
        loop {
            seek(file, &mut position, next)?;
            let mut entries = RawDir::new(file, buffer.spare_capacity_mut());
            let mut any = false;
            while let Some(entry) = entries.next() {
                let entry = entry?;
                any = true;
                if !self.fits(handle, &entry, limit, plus.as_deref_mut(), answer) {
                    *position = u64::MAX;
                    return Ok(Rest::Further);
                }
                next = entry.next_entry_cookie();
                if entries.is_buffer_empty() {
                    break;
                }
            }
            *position = next;
            if !any {
                return Ok(Rest::Here);
            }
        }
    }

    /// Appends an entry if there is room.
    fn fits(
        &self,
        handle: &Handle,
        entry: &RawDirEntry<'_>,
        limit: usize,
        plus: Option<&mut Hints<'_>>,
        answer: &mut Answer,
    ) -> bool {
        let name = entry.file_name();
        let length = dirent_len(name.count_bytes()) + if plus.is_some() { ENTRY_OUT } else { 0 };
        if answer.body_len() + length > limit {
            return false;
        }
        let mut ino = entry.ino();
        if let Some(hints) = plus {
            let dots = matches!(name.to_bytes(), b"." | b"..");
            // What is gone by now, or cannot be looked at, is listed without its node: the host will ask.
            let found = if dots { None } else { self.look_once(&handle.node, name).ok() };
            if let Some((parts, layers)) = hints {
                layers.push(found.as_ref().map_or(0, |(_, attr)| parts.layer(name, attr)));
            }
            match found {
                Some((node, attr)) => {
                    answer.entry(node.id, attr);
                    // As stat(2) tells it, which stays when a copy-up gives the file another.
                    ino = attr.ino;
                }
                None => answer.entry(0, Attr::default()),
            }
        }
        put_entry(entry, ino, answer);
        true
    }
}

/// Appends the folder's path in the layers and the layer of each entry; tells the path's length.
fn put_hints(hints: Hints<'_>, answer: &mut Answer) -> usize {
    let Some((parts, layers)) = hints else { return 0 };
    let path = parts.path.as_os_str().as_bytes();
    answer.bytes(path);
    for layer in layers {
        answer.u16(layer);
    }
    path.len()
}

fn seek(file: &OwnedFd, position: &mut MutexGuard<'_, u64>, to: u64) -> rustix::io::Result<()> {
    if **position != to {
        let to = i64::try_from(to).map_err(|_| Errno::INVAL)?.cast_unsigned();
        rustix::fs::seek(file, SeekFrom::Start(to))?;
        **position = to;
    }
    Ok(())
}

fn put_entry(entry: &RawDirEntry<'_>, ino: u64, answer: &mut Answer) {
    let name = entry.file_name().to_bytes();
    answer.u64(ino).u64(entry.next_entry_cookie());
    answer.u32(name.len() as u32).u32(type_number(entry.file_type()));
    answer.bytes(name);
    let padding = dirent_len(name.len()) - crate::export::wire::abi::DIRENT - name.len();
    answer.bytes(&[0; 8][..padding]);
}

/// `DT_*`, which are the type bits of a mode, moved down.
fn type_number(kind: FileType) -> u32 {
    if kind == FileType::Unknown { 0 } else { kind.as_raw_mode() >> 12 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_have_the_kernel_s_numbers() {
        for (kind, number) in [
            (FileType::RegularFile, libc::DT_REG),
            (FileType::Directory, libc::DT_DIR),
            (FileType::Symlink, libc::DT_LNK),
            (FileType::CharacterDevice, libc::DT_CHR),
            (FileType::Unknown, libc::DT_UNKNOWN),
        ] {
            assert_eq!(type_number(kind), u32::from(number));
        }
    }
}
