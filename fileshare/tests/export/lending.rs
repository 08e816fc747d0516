//! A guest that lies about where files lie in the upper folder.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use vmctr_fileshare::export::wire::abi::{ATTR, InHeader, OPEN_OUT, op};
use vmctr_fileshare::export::wire::codec::Put;
use vmctr_fileshare::export::wire::lent::UpperHint;

use super::rig::assert_errno;
use super::victim::{Deed, FILE, TEXT, Terms, Victim, attr, eio, entry, honest, under_with};

/// Hints at `path` for whatever is opened, with the number of the file that is `like` it.
fn with_hint(
    upper: Option<&'static str>,
    (like, path): (&'static str, &'static str),
    test: impl FnOnce(&Victim<'_>) + Send,
) {
    let place: Arc<OnceLock<PathBuf>> = Arc::default();
    let known = Arc::clone(&place);
    let evil = move |header: &InHeader, body: &[u8]| {
        let Some(folder) = known.get() else { return Deed::Honest };
        let mut hint = Vec::new();
        let ino = fs::metadata(folder.join(like)).unwrap().ino();
        UpperHint { ino, shown: 5, path: path.as_bytes() }.put(&mut hint);
        // The second time, when the host says that it cannot use the file.
        let insisted = body.get(4..8) != Some(&[0; 4]);
        match header.opcode {
            op::OPEN if !insisted => Deed::Body([honest(header, body), hint].concat()),
            op::OPEN_READ if !insisted => {
                let mut answer = Vec::new();
                answer.u64(0).u32(hint.len() as u32).u32(0).bytes(&hint);
                Deed::Body(answer)
            }
            op::CREATE => {
                let mut answer = entry(FILE + 1, libc::S_IFREG);
                answer.u64(9).u64(0).bytes(&hint);
                attr(libc::S_IFDIR).put(&mut answer);
                assert_eq!(answer.len(), entry(7, 0).len() + OPEN_OUT + hint.len() + ATTR);
                Deed::Body(answer)
            }
            _ => Deed::Honest,
        }
    };
    under_with(Terms { upper, ..Terms::default() }, evil, move |victim| {
        let (upper, outside) = (victim.place.folder("upper"), victim.place.folder("outside"));
        fs::create_dir(upper.join("sub")).unwrap();
        fs::write(upper.join("sub/inside"), "of upper").unwrap();
        fs::write(outside.join("secret"), "untouched").unwrap();
        fs::write(victim.place.path("layer/lower"), "untouched").unwrap();
        symlink("../outside/secret", upper.join("link")).unwrap();
        symlink("../outside", upper.join("out")).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, upper.join("fifo"), fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        place.set(victim.place.path("")).unwrap();
        test(victim);
        for name in ["outside/secret", "layer/lower"] {
            assert_eq!(fs::read(victim.place.path(name)).unwrap(), b"untouched");
        }
    });
}

fn write(victim: &Victim<'_>, name: &str) {
    let file = File::options().write(true).create(true).truncate(false).open(victim.path(name)).unwrap();
    file.write_at(b"X", 0).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_file_of_the_upper_folder_is_written_there() {
    with_hint(Some("upper"), ("upper/sub/inside", "sub/inside"), |victim| {
        write(victim, "file");
        assert_eq!(fs::read(victim.place.path("upper/sub/inside")).unwrap(), b"Xf upper");
        assert_eq!(victim.export.figures().host_writes, 1);
        write(victim, "new");
        assert_eq!(victim.export.figures().host_writes, 2);
        assert_eq!(fs::read(victim.path("new")).unwrap(), b"Xf upper");
    });
}

#[test]
fn hints_that_lead_elsewhere_are_not_followed() {
    for hint in [
        ("outside/secret", "../outside/secret"),
        ("outside/secret", "sub/../../outside/secret"),
        ("outside/secret", "/etc/passwd"),
        ("outside/secret", "link"),
        ("outside/secret", "out/secret"),
        ("layer/lower", "../layer/lower"),
        ("upper/fifo", "fifo"),
        ("upper/sub", "sub"),
        ("outside/secret", "sub/inside"),
        ("upper/sub/inside", "sub/none"),
    ] {
        with_hint(Some("upper"), hint, |victim| {
            write(victim, "file");
            assert_eq!(fs::read(victim.path("file")).unwrap(), TEXT, "{hint:?}");
            write(victim, "new");
            assert_eq!(victim.export.figures().host_writes, 0, "{hint:?}");
            assert_eq!(fs::read(victim.place.path("upper/sub/inside")).unwrap(), b"of upper", "{hint:?}");
            assert_eq!(victim.export.lost(), None);
        });
    }
}

#[test]
fn nothing_is_written_or_read_where_there_is_no_upper_folder() {
    with_hint(None, ("upper/sub/inside", "sub/inside"), |victim| {
        write(victim, "file");
        assert_eq!(fs::read(victim.path("file")).unwrap(), TEXT);
        let figures = victim.export.figures();
        assert_eq!((figures.host_writes, figures.host_reads), (0, 0));
        assert_eq!(fs::read(victim.place.path("upper/sub/inside")).unwrap(), b"of upper");
    });
}

#[test]
fn a_guest_that_insists_on_a_hint_is_eio() {
    let evil = |header: &InHeader, body: &[u8]| {
        let mut hint = Vec::new();
        UpperHint { ino: 1, shown: 5, path: b"none" }.put(&mut hint);
        let mut reading = Vec::new();
        reading.u64(0).u32(hint.len() as u32).u32(0).bytes(&hint);
        match header.opcode {
            op::OPEN => Deed::Body([honest(header, body), hint].concat()),
            op::OPEN_READ => Deed::Body(reading),
            _ => Deed::Honest,
        }
    };
    under_with(Terms { upper: Some("upper"), ..Terms::default() }, evil, |victim| {
        eio(File::options().write(true).open(victim.path("file")));
        eio(fs::read(victim.path("file")));
        assert_eq!(victim.export.lost(), None);
    });
}

#[test]
fn hints_that_are_none_are_eio() {
    let with = |bytes: &'static [u8]| {
        move |header: &InHeader, body: &[u8]| match header.opcode {
            op::OPEN => Deed::Body([&*honest(header, body), bytes].concat()),
            _ => Deed::Honest,
        }
    };
    let cases: [&[u8]; 3] = [b"x", &[0; 30], &[0xff; 30]];
    for bytes in cases {
        under_with(Terms { upper: Some("upper"), ..Terms::default() }, with(bytes), |victim| {
            assert_errno(File::options().write(true).open(victim.path("file")), libc::EIO);
            victim.assert_usable();
        });
    }
}
