//! A guest that means harm: whatever it answers, the mount says EIO, the host goes on, and nobody hangs.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use vmctr_fileshare::export::host::{Config, Export, Lost, StartError, Streams};
use vmctr_fileshare::export::wire::abi::{Attr, Entry, InHeader, MAX_MESSAGE, OUT_HEADER, OutHeader, op};
use vmctr_fileshare::export::wire::codec::Put;
use vmctr_fileshare::export::wire::hello::Hello;
use vmctr_fileshare::export::wire::stream::Stream;

use super::rig::{Place, assert_errno, in_private_namespace, take_away};
use super::victim::{
    Deed, FILE, PATIENCE, TEXT, Terms, attr, eio, entry, folder, framed, honest, instead, listed, under,
    under_with,
};
#[test]
fn the_stand_in_can_be_honest() {
    under(|_, _| Deed::Honest, |victim| victim.assert_usable());
}

#[test]
fn answers_of_wrong_length_are_eio() {
    for body in [vec![], vec![0; 1], vec![0; 79], vec![0; 81], vec![0; 60_000]] {
        under(instead(op::STATFS, body), |victim| {
            eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
            victim.assert_usable();
        });
    }
    under(instead(op::GETXATTR, vec![0; 7]), |victim| {
        let asked = rustix::fs::getxattr(victim.path("file"), "user.x", &mut [0u8; 0]);
        eio(asked.map_err(io::Error::from));
        victim.assert_usable();
    });
    under(instead(op::READLINK, vec![b'x'; 4096]), |victim| {
        eio(fs::read_link(victim.path("link")));
        victim.assert_usable();
    });
}

#[test]
fn more_data_than_asked_is_eio() {
    let body: Vec<u8> = std::iter::repeat_n(0, 16 + 1_000_000).collect();
    under(instead(op::OPEN_READ, body), |victim| {
        eio(fs::read(victim.path("file")));
        assert_eq!(victim.try_listing().unwrap(), 1);
        assert_eq!(victim.export.lost(), None);
    });
}

#[test]
fn more_written_than_sent_is_eio() {
    let mut body = Vec::new();
    body.u32(100).u32(0);
    under(instead(op::WRITE, body), |victim| {
        let file = File::options().write(true).open(victim.path("file")).unwrap();
        eio(file.write_at(b"x", 0));
        victim.assert_usable();
    });
}

#[test]
fn impossible_files_are_eio() {
    let with = |change: fn(&mut Attr)| {
        let mut body = Vec::new();
        let mut attr = attr(libc::S_IFREG);
        change(&mut attr);
        Entry { nodeid: FILE, attr }.put(&mut body);
        body
    };
    let bodies = [
        with(|attr| attr.size = u64::MAX),
        with(|attr| attr.size = 1 << 63),
        with(|attr| attr.mode = 0o644),
        with(|attr| attr.mode = 0o150_644),
        with(|attr| attr.mtimensec = 1_000_000_000),
        with(|attr| attr.blksize = 12345),
        with(|attr| attr.blksize = 0),
        with(|attr| attr.flags = 1),
        entry(1, libc::S_IFDIR),
    ];
    for body in bodies {
        under(instead(op::LOOKUP, body), |victim| {
            eio(fs::metadata(victim.path("new")));
            assert_eq!(victim.export.lost(), None);
        });
    }
}

#[test]
fn another_type_than_was_made_is_eio() {
    let made = |kind| {
        let mut body = entry(7, kind);
        attr(libc::S_IFDIR).put(&mut body);
        body
    };
    under(instead(op::MKDIR, made(libc::S_IFDIR)), |victim| fs::create_dir(victim.path("dir")).unwrap());
    under(instead(op::MKDIR, made(libc::S_IFREG)), |victim| {
        eio(fs::create_dir(victim.path("dir")));
        victim.assert_usable();
    });
    under(instead(op::SYMLINK, made(libc::S_IFCHR)), |victim| {
        eio(std::os::unix::fs::symlink("x", victim.path("sym")));
        victim.assert_usable();
    });
}

#[test]
fn bad_names_in_a_listing_are_eio() {
    for name in [b"".as_slice(), b"a/b", b"../x", b"/", b"a\0b", &[b'x'; 256]] {
        under(instead(op::OPENDIR_READ, folder(&listed(name, 1), true)), |victim| {
            eio(victim.try_listing());
            assert_eq!(fs::read(victim.path("file")).unwrap(), TEXT);
        });
    }
    let dots = folder(&listed(b"..", 1), true);
    under(instead(op::OPENDIR_READ, dots), |victim| eio(victim.try_listing()));
}

#[test]
fn listings_with_other_lengths_than_they_have_are_eio() {
    let listing = |entries: u32, path: u32, padding: u32, rest: &[u8]| {
        let mut body = Vec::new();
        body.u64(9).u32(1).u32(entries).u32(path).u32(padding).bytes(&listed(b"file", 1)).bytes(rest);
        body
    };
    let length = listed(b"file", 1).len() as u32;
    under(instead(op::OPENDIR_READ, listing(length, 1, 0, b"d\0\0")), |victim| {
        assert_eq!(victim.try_listing().unwrap(), 1);
    });
    for body in [
        listing(length + 1, 0, 0, b""),
        listing(u32::MAX, 0, 0, b""),
        listing(length, 1, 0, b""),
        listing(length, u32::MAX, 0, b"d"),
        listing(length, 0, 1, b""),
        listing(length, 0, 0, b"\x01"),
        listing(length, 0, 0, b"\x01\0\x01\0"),
        listing(0, 0, 0, b""),
    ] {
        under(instead(op::OPENDIR_READ, body), |victim| eio(victim.try_listing()));
    }
}

#[test]
fn a_folder_without_end_ends() {
    let endless = |header: &InHeader, body: &[u8]| {
        let offset =
            u64::from_le_bytes(*body.get(8..).and_then(|rest| rest.first_chunk()).unwrap_or(&[0; 8]));
        let entries: Vec<u8> =
            (0..20).flat_map(|at| listed(format!("n{}", offset + at).as_bytes(), offset + at + 1)).collect();
        match header.opcode {
            op::OPENDIR_READ => Deed::Body(folder(&entries, false)),
            op::READDIRPLUS => Deed::Body(entries),
            _ => Deed::Honest,
        }
    };
    under(endless, |victim| {
        eio(victim.try_listing());
        assert_eq!(fs::read(victim.path("file")).unwrap(), TEXT);
    });
}

#[test]
fn errors_that_are_none_are_eio() {
    for error in [1, -134, -512, i32::MIN, -libc::ENOSYS] {
        let evil = move |header: &InHeader, _: &[u8]| {
            let mut message = Vec::new();
            OutHeader { len: OUT_HEADER as u32, error, unique: header.unique }.put(&mut message);
            if header.opcode == op::STATFS { Deed::Raw(message) } else { Deed::Honest }
        };
        under(evil, |victim| {
            eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
            victim.assert_usable();
        });
    }
}

#[test]
fn answers_to_other_requests_are_eio_and_the_late_ones_left_out() {
    let evil = |header: &InHeader, body: &[u8]| {
        let mut answers = framed(header.unique + 1000, &honest(header, body));
        answers.extend_from_slice(&framed(header.unique, &honest(header, body)));
        if header.opcode == op::STATFS { Deed::Raw(answers) } else { Deed::Honest }
    };
    under(evil, |victim| {
        for _ in 0..5 {
            eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
        }
        victim.assert_usable();
    });
}

#[test]
fn notifications_are_not_taken() {
    // FUSE_NOTIFY_INVAL_INODE of the root, where the answer should be.
    let evil = |header: &InHeader, body: &[u8]| {
        let mut notification = Vec::new();
        OutHeader { len: OUT_HEADER as u32 + 24, error: 2, unique: 0 }.put(&mut notification);
        notification.u64(1).u64(0).u64(0);
        notification.extend_from_slice(&framed(header.unique, &honest(header, body)));
        if header.opcode == op::STATFS { Deed::Raw(notification) } else { Deed::Honest }
    };
    under(evil, |victim| {
        eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
        victim.assert_usable();
    });
}

#[test]
fn a_guest_that_only_answers_others_is_given_up() {
    let evil = |header: &InHeader, body: &[u8]| match header.opcode {
        op::STATFS => Deed::Raw(framed(header.unique + 1000, &honest(header, body))),
        _ => Deed::Honest,
    };
    under(evil, |victim| {
        for _ in 0..200 {
            eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
        }
        assert!(matches!(victim.export.lost(), Some(Lost::Broken(_))));
        eio(fs::read(victim.path("file")));
    });
}

#[test]
fn lengths_that_no_message_has_end_it_all() {
    for length in [0u32, 3, 15, MAX_MESSAGE as u32 + 1, u32::MAX] {
        let evil = move |header: &InHeader, _: &[u8]| match header.opcode {
            op::STATFS => Deed::Raw([length.to_le_bytes().as_slice(), &[0; 64]].concat()),
            _ => Deed::Honest,
        };
        under(evil, |victim| {
            eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
            assert!(matches!(victim.export.lost(), Some(Lost::Broken(_))), "{length}");
            eio(victim.try_listing());
        });
    }
}

#[test]
fn a_guest_that_is_slow_and_alive_is_waited_for() {
    let slow = |header: &InHeader, _: &[u8]| {
        if header.opcode == op::STATFS {
            std::thread::sleep(3 * PATIENCE);
        }
        Deed::Honest
    };
    under(slow, |victim| {
        rustix::fs::statvfs(&victim.root).unwrap();
        victim.assert_usable();
    });
}

#[test]
fn a_guest_that_is_alive_and_never_answers_is_given_up_too() {
    let evil =
        |header: &InHeader, _: &[u8]| if header.opcode == op::STATFS { Deed::Silence } else { Deed::Honest };
    under_with(Terms { patience: PATIENCE / 10, ..Terms::default() }, evil, |victim| {
        eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
        assert!(matches!(victim.export.lost(), Some(Lost::Silent(_))));
    });
}

#[test]
fn silence_is_eio_after_a_while() {
    let evil = |header: &InHeader, _: &[u8]| match header.opcode {
        op::STATFS | op::SIGN => Deed::Silence,
        _ => Deed::Honest,
    };
    under(evil, |victim| {
        let file = File::open(victim.path("file")).unwrap();
        let started = Instant::now();
        eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
        assert!(started.elapsed() < Duration::from_secs(4));
        assert!(matches!(victim.export.lost(), Some(Lost::Silent(_))));
        eio((&file).read(&mut [0; 1]));
    });
}

#[test]
fn a_guest_that_goes_leaves_eio_and_a_mount_that_can_be_taken_away() {
    let evil =
        |header: &InHeader, _: &[u8]| if header.opcode == op::STATFS { Deed::Close } else { Deed::Honest };
    under(evil, |victim| {
        let started = Instant::now();
        eio(rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
        assert_eq!(victim.export.lost(), Some(Lost::Closed));
        eio(fs::read(victim.path("file")));
        assert!(started.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn a_mount_that_is_cut_off_is_not_connected() {
    let evil =
        |header: &InHeader, _: &[u8]| if header.opcode == op::STATFS { Deed::Silence } else { Deed::Honest };
    under(evil, |victim| {
        std::thread::scope(|scope| {
            let pending = scope.spawn(|| rustix::fs::statvfs(&victim.root).map_err(io::Error::from));
            std::thread::sleep(Duration::from_millis(300));
            let started = Instant::now();
            victim.export.cut();
            assert!(pending.join().unwrap().is_err());
            assert!(started.elapsed() < Duration::from_secs(2));
        });
        assert_errno(fs::read(victim.path("file")), libc::ENOTCONN);
    });
}

#[test]
fn locks_that_nobody_answers_can_be_interrupted() {
    let evil =
        |header: &InHeader, _: &[u8]| if header.opcode == op::SETLKW { Deed::Silence } else { Deed::Honest };
    under(evil, |victim| {
        let mut child = Command::new("flock").arg(victim.path("file")).arg("true").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(child.try_wait().unwrap(), None, "flock did not wait");
        let started = Instant::now();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(started.elapsed() < Duration::from_secs(5));
        victim.assert_usable();
    });
}

#[test]
fn a_guest_that_says_no_hello_is_not_mounted() {
    in_private_namespace(|| {
        let place = Place::new();
        let (one, _silent) = Stream::pair().unwrap();
        let (other, _too) = Stream::pair().unwrap();
        let config = Config { patience: Duration::from_millis(300), ..Config::new(place.folder("mnt")) };
        let started = Instant::now();
        let error = Export::start(&config, Streams { turns: vec![one], waits: other }).unwrap_err();
        assert!(matches!(error, StartError::Hello(_)), "{error:?}");
        assert!(started.elapsed() < Duration::from_secs(5));
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        assert!(!mounts.contains(config.mountpoint.to_str().unwrap()));
    });
}

#[test]
fn a_guest_that_reads_nothing_hangs_nobody() {
    in_private_namespace(|| {
        let place = Place::new();
        let root = place.folder("mnt");
        let mut kept = Vec::new();
        let mut stream = || {
            let (ours, theirs) = Stream::pair().unwrap();
            // Says hello, and nothing more.
            kept.push(std::thread::spawn(move || {
                Hello::hear(&theirs).unwrap().welcome(&theirs, u64::MAX).unwrap();
                theirs
            }));
            ours
        };
        let streams = Streams { turns: vec![stream()], waits: stream() };
        let config = Config { patience: Duration::from_millis(500), ..Config::new(root.clone()) };
        let export = Export::start(&config, streams).unwrap();
        let started = Instant::now();
        eio(rustix::fs::statvfs(&root).map_err(io::Error::from));
        assert!(started.elapsed() < Duration::from_secs(5));
        take_away(&root);
        assert!(matches!(export.wait(), Some(Lost::Silent(_))));
        drop(kept);
    });
}
