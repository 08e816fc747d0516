//! An answer's nodes, by the numbers that the kernel has for them.
//!
//! ```text
//!   answer that was checked ── the guest's nodes, and where folders lie whole ──> served ──> the kernel's numbers
//! ```

use super::check::{Folder, entries, pure_part};
use super::question::{made, put_u64_at};
use super::served::{Served, Settled};
use crate::export::wire::abi::{ATTR, ATTR_OUT, ENTRY_OUT, Entry, InHeader, LISTED, OUT_HEADER, op};

/// Where in a `fuse_entry_out` the inode's number is.
const INO: usize = ENTRY_OUT - ATTR;

/// Puts the kernel's numbers into the body of an answer that was checked.
pub(super) fn settle(served: &Served, header: &InHeader, request: &[u8], body: &mut [u8]) {
    if !served.serves() {
        return;
    }
    match header.opcode {
        op::READDIRPLUS => {
            let settled = listing(served, header.nodeid, body, &[], std::iter::repeat(None));
            put_listing(body, &settled);
        }
        op::OPENDIR_READ => {
            let Ok(folder) = Folder::of(body) else { return };
            let settled = listing(served, header.nodeid, folder.entries, folder.path, folder.layers());
            put_listing(&mut body[LISTED..], &settled);
        }
        op::GETATTR | op::SETATTR => {
            served.ino(header.nodeid).into_iter().for_each(|ino| put_u64_at(body, ATTR_OUT - ATTR, ino));
        }
        opcode => {
            let (Some(name), Ok(entry)) = (made(opcode, request), Entry::take_completed(body)) else {
                return;
            };
            let pure = if opcode == op::LOOKUP { pure_part(body) } else { None };
            let settled = served.settle(header.nodeid, name, &entry, pure);
            put(body, settled);
        }
    }
}

/// Each entry's place in the listing, and its numbers.
fn listing(
    served: &Served,
    folder: u64,
    listing: &[u8],
    path: &[u8],
    layers: impl Iterator<Item = Option<usize>>,
) -> Vec<(usize, Settled)> {
    let mut at = 0;
    let mut settled = Vec::new();
    for (listed, layer) in entries(listing).zip(layers.chain(std::iter::repeat(None))) {
        let entry = Entry::take_completed(&listing[at..]).unwrap_or_default();
        let whole = layer.filter(|_| entry.attr.kind() == libc::S_IFDIR).map(|layer| match path {
            [] => (layer, listed.name.to_vec()),
            path => (layer, [path, b"/", listed.name].concat()),
        });
        let whole = whole.as_ref().map(|(layer, path)| (*layer, &**path));
        settled.push((at, served.settle(folder, listed.name, &entry, whole)));
        at += listed.length;
    }
    settled
}

fn put_listing(listing: &mut [u8], settled: &[(usize, Settled)]) {
    for (at, settled) in settled {
        put(&mut listing[*at..], *settled);
        // The inode's number once more, as the listing itself has it.
        settled.ino.into_iter().for_each(|ino| put_u64_at(listing, at + ENTRY_OUT, ino));
    }
}

fn put(entry: &mut [u8], settled: Settled) {
    put_u64_at(entry, 0, settled.id);
    settled.ino.into_iter().for_each(|ino| put_u64_at(entry, INO, ino));
}

/// The kernel's part of an answer.
pub(super) fn without_place(opcode: u32, answer: &mut [u8]) -> &mut [u8] {
    let length = answer.len();
    match opcode {
        op::LOOKUP => &mut answer[..length.min(OUT_HEADER + ENTRY_OUT)],
        _ => answer,
    }
}
