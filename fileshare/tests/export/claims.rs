//! A guest that lies about which folders lie whole in a layer, and about what is found in them.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use vmctr_fileshare::export::wire::abi::{Attr, Entry, InHeader, op};
use vmctr_fileshare::export::wire::codec::Put;

use super::rig::assert_errno;
use super::victim::{Deed, TEXT, Victim, eio, entry, under};

/// Says of every name that it is a folder, as one of the host's is, which lies whole at a path of the first layer.
fn claims(like: PathBuf, path: &'static [u8]) -> impl Fn(&InHeader, &[u8]) -> Deed + Send + Sync + 'static {
    move |header, _| {
        use std::os::unix::fs::MetadataExt;
        if header.opcode != op::LOOKUP {
            return Deed::Honest;
        }
        let meta = fs::symlink_metadata(&like).unwrap();
        let (mtime, mtimensec) = (meta.mtime() as u64, meta.mtime_nsec() as u32);
        let (ino, mode, nlink) = (meta.ino(), libc::S_IFDIR | 0o755, meta.nlink() as u32);
        let attr = Attr { ino, mode, nlink, mtime, mtimensec, blksize: 4096, ..Attr::default() };
        let mut body = Vec::new();
        Entry { nodeid: 20, attr }.put(&mut body);
        body.u32(1).u32(0).bytes(path);
        Deed::Body(body)
    }
}

/// The folder of the test that is being run.
fn with_claim(like: &'static str, path: &'static [u8], test: impl FnOnce(&Victim<'_>) + Send) {
    let place: Arc<OnceLock<PathBuf>> = Arc::default();
    let known = Arc::clone(&place);
    let evil = move |header: &InHeader, body: &[u8]| match known.get() {
        Some(folder) => claims(folder.join(like), path)(header, body),
        None => Deed::Honest,
    };
    under(evil, move |victim| {
        place.set(victim.place.path("")).unwrap();
        test(victim);
    });
}

#[test]
fn a_folder_that_lies_whole_in_a_layer_is_found_without_the_guest() {
    with_claim("layer/whole", b"whole", |victim| {
        assert_eq!(fs::read(victim.path("x/inside")).unwrap(), TEXT);
        assert_eq!(fs::read_dir(victim.path("x")).unwrap().count(), 3);
        assert_eq!(fs::read_link(victim.path("x/up")).unwrap(), PathBuf::from(".."));
    });
}

#[test]
fn claims_that_lead_out_of_the_layer_are_not_followed() {
    let cases: [(&'static str, &'static [u8]); 5] = [
        ("outside", b"../outside"),
        ("outside", b"whole/../../outside"),
        ("layer", b"whole/up"),
        ("layer/whole/below", b"whole"),
        ("layer/whole/below", b"whole/\0/below"),
    ];
    for (like, path) in cases {
        with_claim(like, path, |victim| {
            // To the guest, all names are one folder, which the kernel refuses to have in itself.
            assert_errno(fs::metadata(victim.path("x/inside")), libc::ELOOP);
        });
    }
}

#[test]
fn a_guest_that_finds_something_else_gets_nothing_done() {
    // FIND is answered by a folder where the layer has a file, by too few, and by the host's own numbers.
    for found in
        [entry(30, libc::S_IFDIR), Vec::new(), entry(1 << 63, libc::S_IFREG), entry(1, libc::S_IFREG)]
    {
        let place: Arc<OnceLock<PathBuf>> = Arc::default();
        let known = Arc::clone(&place);
        let evil = move |header: &InHeader, body: &[u8]| match (known.get(), header.opcode) {
            (Some(_), op::FIND) => Deed::Body(found.clone()),
            (Some(folder), _) => claims(folder.join("layer/whole"), b"whole")(header, body),
            _ => Deed::Honest,
        };
        under(evil, move |victim| {
            place.set(victim.place.path("")).unwrap();
            eio(File::options().write(true).open(victim.path("x/inside")));
            assert_eq!(victim.export.lost(), None);
        });
    }
}
