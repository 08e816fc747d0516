//! A mount that a guest serves which is honest, but for what a test has it do.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmctr_fileshare::export::host::{Config, Export, Streams};
use vmctr_fileshare::export::wire::abi::{
    Attr, Entry, IN_HEADER, InHeader, MAX_MESSAGE, OUT_HEADER, OutHeader, is_silent, op,
};
use vmctr_fileshare::export::wire::codec::{Put, Take};
use vmctr_fileshare::export::wire::hello::Hello;
use vmctr_fileshare::export::wire::stream::{Inbox, Stream};

use super::rig::{Place, assert_errno, in_private_namespace, take_away};

/// The one file there is.
pub const FILE: u64 = 2;
pub const TEXT: &[u8] = b"honest text";

/// What the guest sends instead of an honest answer.
pub enum Deed {
    /// An honest answer.
    Honest,
    /// This body, under an honest header.
    Body(Vec<u8>),
    /// These bytes.
    Raw(Vec<u8>),
    /// Nothing, and waits for the next.
    Silence,
    /// Nothing, and closes.
    Close,
}

pub type Evil = dyn Fn(&InHeader, &[u8]) -> Deed + Send + Sync;

pub fn attr(kind: u32) -> Attr {
    let (size, mode) = (TEXT.len() as u64, kind | 0o755);
    Attr { ino: 5, size, mode, nlink: 1, blksize: 4096, ..Attr::default() }
}

pub fn entry(nodeid: u64, kind: u32) -> Vec<u8> {
    let mut body = Vec::new();
    Entry { nodeid, attr: attr(kind) }.put(&mut body);
    body
}

/// One entry of a listing, with a node of its own.
pub fn listed(name: &[u8], offset: u64) -> Vec<u8> {
    let mut body = entry(FILE, libc::S_IFREG);
    body.u64(5).u64(offset).u32(name.len() as u32).u32(8).bytes(name);
    body.resize(body.len().next_multiple_of(8), 0);
    body
}

/// An open folder's listing, without hints.
pub fn folder(entries: &[u8], whole: bool) -> Vec<u8> {
    let mut body = Vec::new();
    body.u64(9).u32(whole.into()).u32(entries.len() as u32).u64(0).bytes(entries);
    body
}

pub fn honest(header: &InHeader, body: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    match header.opcode {
        op::LOOKUP if body == b"file\0" => answer = entry(FILE, libc::S_IFREG),
        op::LOOKUP if body == b"link\0" => answer = entry(3, libc::S_IFLNK),
        op::LOOKUP => Entry::default().put(&mut answer),
        op::GETATTR => {
            answer.u64(0).u64(0);
            attr(if header.nodeid == 1 { libc::S_IFDIR } else { libc::S_IFREG }).put(&mut answer);
        }
        op::READLINK => answer.extend_from_slice(b"file"),
        op::OPEN_READ => drop(answer.u64(0).u64(0).bytes(TEXT)),
        op::OPENDIR_READ => drop(answer.bytes(&folder(&listed(b"file", 1), true))),
        op::OPEN => drop(answer.u64(9).u64(0)),
        op::WRITE => drop(answer.u32(1).u32(0)),
        op::GETXATTR | op::LISTXATTR => drop(answer.u32(0).u32(0)),
        op::STATFS => {
            answer.bytes(&[0; 40]).u32(4096).u32(255).u32(4096).bytes(&[0; 28]);
        }
        _ => {}
    }
    answer
}

pub fn framed(unique: u64, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    OutHeader { len: (OUT_HEADER + body.len()) as u32, error: 0, unique }.put(&mut message);
    message.extend_from_slice(body);
    message
}

pub fn serve(stream: &Stream, evil: &Evil) {
    Hello::hear(stream).unwrap().welcome(stream, u64::MAX).unwrap();
    let mut inbox = Inbox::default();
    while let Ok(message) = inbox.next(stream, IN_HEADER, MAX_MESSAGE) {
        let header = InHeader::take(&mut Take::new(message)).unwrap();
        let body = &message[IN_HEADER..];
        if is_silent(header.opcode) {
            continue;
        }
        let answer = match evil(&header, body) {
            Deed::Honest => framed(header.unique, &honest(&header, body)),
            Deed::Body(body) => framed(header.unique, &body),
            Deed::Raw(bytes) => bytes,
            Deed::Silence => continue,
            Deed::Close => return,
        };
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

/// A mount that an evil guest serves.
pub struct Victim<'a> {
    pub root: PathBuf,
    pub export: Export,
    pub place: &'a Place,
}

impl Victim<'_> {
    pub fn try_listing(&self) -> io::Result<usize> {
        fs::read_dir(&self.root)?.try_fold(0, |count, entry| entry.map(|_| count + 1))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The rest of the mount is as it was.
    pub fn assert_usable(&self) {
        assert_eq!(self.export.lost(), None);
        assert_eq!(fs::read(self.path("file")).unwrap(), TEXT);
        assert_eq!(self.try_listing().unwrap(), 1);
    }
}

pub fn under(
    evil: impl Fn(&InHeader, &[u8]) -> Deed + Send + Sync + 'static,
    test: impl FnOnce(&Victim<'_>) + Send,
) {
    under_with(Terms::default(), evil, test);
}

/// How long the guest may be silent.
pub const PATIENCE: Duration = Duration::from_millis(1500);

/// What may differ between mounts.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// The folder for changes.
    pub upper: Option<&'a str>,
    pub patience: Duration,
}

impl Default for Terms<'_> {
    fn default() -> Self {
        Self { upper: None, patience: PATIENCE }
    }
}

pub fn under_with(
    terms: Terms<'_>,
    evil: impl Fn(&InHeader, &[u8]) -> Deed + Send + Sync + 'static,
    test: impl FnOnce(&Victim<'_>) + Send,
) {
    in_private_namespace(|| {
        let place = Place::new();
        let root = place.folder("mnt");
        let evil: Arc<Evil> = Arc::new(evil);
        let mut threads = Vec::new();
        let mut stream = || {
            let (ours, theirs) = Stream::pair().unwrap();
            let evil = Arc::clone(&evil);
            threads.push(std::thread::spawn(move || serve(&theirs, &*evil)));
            ours
        };
        let streams = Streams { turns: vec![stream(), stream(), stream()], waits: stream() };
        let layer = place.folder("layer");
        fs::create_dir_all(layer.join("whole/below")).unwrap();
        fs::write(layer.join("whole/inside"), TEXT).unwrap();
        std::os::unix::fs::symlink("..", layer.join("whole/up")).unwrap();
        fs::create_dir(place.path("outside")).unwrap();
        let config = Config {
            patience: terms.patience,
            most_entries: 5000,
            layers: vec![layer],
            upper: terms.upper.map(|name| place.folder(name)),
            ..Config::new(root.clone())
        };
        let export = Export::start(&config, streams).unwrap();
        let victim = Victim { root, export, place: &place };
        test(&victim);
        take_away(&victim.root);
        let started = Instant::now();
        victim.export.wait();
        assert!(started.elapsed() < Duration::from_secs(2), "the end took too long");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

pub fn eio<T>(result: io::Result<T>) {
    assert_errno(result, libc::EIO);
}

/// Answers one opcode with a body.
pub fn instead(opcode: u32, body: Vec<u8>) -> impl Fn(&InHeader, &[u8]) -> Deed + Send + Sync + 'static {
    move |header, _| if header.opcode == opcode { Deed::Body(body.clone()) } else { Deed::Honest }
}
