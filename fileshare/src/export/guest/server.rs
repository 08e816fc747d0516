//! The server: takes requests off a stream, does them, answers.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::caller::own_thread;
use super::found::Found;
use super::gate::Gate;
use super::handles::Handles;
use super::layers::Layers;
use super::lend::Lender;
use super::locks::{Locks, Wish};
use super::message::{Answer, Request};
use super::nodes::Nodes;
use super::room::Room;
use super::waits::{Replies, Waits};
use crate::export::wire::abi::{IN_HEADER, MAX_MESSAGE, feature, is_silent, op};
use crate::export::wire::codec::{Malformed, Take};
use crate::export::wire::hello::{Hello, HelloError, Lane};
use crate::export::wire::stream::{Inbox, Stream, StreamError};

/// What this server does, in the protocol's words.
const FEATURES: u64 = feature::ASYNC_READ
    | feature::POSIX_LOCKS
    | feature::ATOMIC_O_TRUNC
    | feature::BIG_WRITES
    | feature::DONT_MASK
    | feature::FLOCK_LOCKS
    | feature::AUTO_INVAL_DATA
    | feature::DO_READDIRPLUS
    | feature::ASYNC_DIO
    | feature::WRITEBACK_CACHE
    | feature::PARALLEL_DIROPS
    | feature::POSIX_ACL
    | feature::ABORT_ERROR
    | feature::MAX_PAGES
    | feature::CACHE_SYMLINKS
    | feature::HANDLE_KILLPRIV_V2
    | feature::SETXATTR_EXT
    | feature::INIT_EXT
    | feature::CREATE_SUPP_GROUP
    | feature::PASSTHROUGH
    | feature::LEND;

/// A folder, served. Its lanes share nodes, handles and locks.
#[derive(Debug)]
pub struct Server {
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    pub(super) locks: Locks,
    pub(super) waits: Waits,
    pub(super) root: OwnedFd,
    pub(super) layers: Option<Layers>,
    pub(super) lender: Lender,
    gate: Arc<Gate>,
    pub(super) room: Room,
    writeback: AtomicBool,
}

/// The server cannot serve, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The folder cannot be opened.
    #[error("Cannot open the folder to be exported")]
    Root(#[source] io::Error),
    /// The thread could not be set up.
    #[error("Cannot give the thread a umask of its own")]
    Thread(#[source] io::Error),
    /// Host and guest do not get along.
    #[error("The export's stream did not begin well")]
    Hello(#[source] HelloError),
    /// The stream failed.
    #[error("The export's stream failed")]
    Stream(#[source] StreamError),
}

/// Why a request fails.
#[derive(Debug)]
pub(super) enum Failure {
    Errno(Errno),
    Malformed(Malformed),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl Server {
    /// Serves the folder at `root`. What is mounted below is served with it.
    ///
    /// # Errors
    /// It cannot be opened, or is no folder.
    pub fn new(root: &Path) -> Result<Self, ServeError> {
        let open = |flags| {
            rustix::fs::open(root, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|errno| ServeError::Root(errno.into()))
        };
        let nodes = Nodes::new(open(OFlags::PATH)?).map_err(|errno| ServeError::Root(errno.into()))?;
        Ok(Self {
            nodes,
            handles: Handles::default(),
            locks: Locks::default(),
            waits: Waits::default(),
            root: open(OFlags::RDONLY)?,
            layers: None,
            lender: Lender::default(),
            gate: Arc::default(),
            room: Room::default(),
            writeback: AtomicBool::new(false),
        })
    }

    /// Tells the host which of its own files it could read by itself. Only for an overlay of these layers that
    /// nobody changes but the host's mount.
    pub fn with_layers(self, layers: Layers) -> Self {
        Self { layers: Some(layers), ..self }
    }

    /// Lets changes through this gate only.
    pub fn with_gate(self, gate: Arc<Gate>) -> Self {
        Self { gate, ..self }
    }

    /// Serves one stream until the host closes it. Blocks; wants a thread of its own.
    ///
    /// # Errors
    /// The host speaks another protocol or version, or the stream fails otherwise than by being closed.
    pub fn serve(&self, stream: Stream) -> Result<(), ServeError> {
        let hello = Hello::hear(&stream).map_err(ServeError::Hello)?;
        self.serve_greeted(stream, &hello)
    }

    /// As [`Server::serve`], for who heard the hello itself, to find out which export is meant.
    ///
    /// # Errors
    /// As there.
    pub fn serve_greeted(&self, stream: Stream, hello: &Hello) -> Result<(), ServeError> {
        own_thread().map_err(ServeError::Thread)?;
        let agreed = hello.welcome(&stream, FEATURES).map_err(ServeError::Hello)?;
        self.writeback.store(agreed & feature::WRITEBACK_CACHE != 0, Ordering::Relaxed);
        self.lender.agree(agreed & feature::LEND != 0);
        let ended = match hello.lane {
            Lane::Turns => self.take_turns(&stream),
            Lane::Waits => self.let_wait(stream),
        };
        match ended {
            StreamError::Closed => Ok(()),
            error => Err(ServeError::Stream(error)),
        }
    }

    /// Whether the host's kernel gathers writes. It says so when it mounts.
    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    fn take_turns(&self, stream: &Stream) -> StreamError {
        let (mut inbox, mut answer, mut found) = (Inbox::default(), Answer::default(), Found::default());
        loop {
            let message = match inbox.next(stream, IN_HEADER, MAX_MESSAGE) {
                Ok(message) => message,
                Err(error) => return error,
            };
            found.put_into(message);
            let reply = self.handle(message, &mut answer).unwrap_or_default();
            let more = inbox.has_more();
            if let Err(error) = found.answer(stream, inbox.last(), reply, more) {
                return error;
            }
        }
    }

    fn let_wait(&self, stream: Stream) -> StreamError {
        let replies = Replies::new(stream);
        std::thread::scope(|scope| {
            scope.spawn(|| self.waits.run(self, &replies));
            let mut inbox = Inbox::default();
            let ended = loop {
                match inbox.next(&replies.stream, IN_HEADER, MAX_MESSAGE) {
                    Ok(message) => self.take_waiting(message, &replies),
                    Err(error) => break error,
                }
            };
            self.waits.end(&replies);
            self.waits.something_changed();
            ended
        })
    }

    fn take_waiting(&self, message: &[u8], replies: &Arc<Replies>) {
        if let Err(failure) = self.wait_or_interrupt(message, replies) {
            let mut answer = Answer::default();
            let reply = self.failed(message, &failure, &mut answer);
            reply.into_iter().for_each(|reply| replies.send(reply));
        }
    }

    fn wait_or_interrupt(&self, message: &[u8], replies: &Arc<Replies>) -> Result<(), Failure> {
        let mut request = Request::parse(message)?;
        match request.header.opcode {
            op::SETLKW => {
                let wish = Wish::take(request.header.nodeid, &mut request.body)?;
                request.body.end()?;
                self.waits.add(self, request.header.unique, wish, replies);
            }
            op::INTERRUPT => self.waits.interrupt(request.body.u64()?, replies),
            _ => {
                let mut answer = Answer::default();
                self.handle(message, &mut answer).into_iter().for_each(|reply| replies.send(reply));
            }
        }
        Ok(())
    }

    /// Does what a message asks, and makes its answer if it has one.
    fn handle<'a>(&self, message: &[u8], answer: &'a mut Answer) -> Option<&'a [u8]> {
        answer.clear();
        let done = Request::parse(message).map_err(Failure::from).and_then(|mut request| {
            self.dispatch(&mut request, answer)?;
            Ok(request.header)
        });
        match done {
            Ok(header) if is_silent(header.opcode) => None,
            Ok(header) => Some(answer.finish(header.unique, Ok(()))),
            Err(failure) => self.failed(message, &failure, answer),
        }
    }

    fn failed<'a>(&self, message: &[u8], failure: &Failure, answer: &'a mut Answer) -> Option<&'a [u8]> {
        // The inbox hands out no message without a whole header.
        let header = crate::export::wire::abi::InHeader::take(&mut Take::new(message)).unwrap_or_default();
        let errno = match failure {
            Failure::Errno(errno) => *errno,
            Failure::Malformed(malformed) => {
                tracing::warn!(opcode = header.opcode, "malformed request: {malformed}");
                Errno::INVAL
            }
        };
        (!is_silent(header.opcode)).then(|| answer.finish(header.unique, Err(errno)))
    }

    fn dispatch(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        let _inside = self.gate.enter(request.header.opcode)?;
        match request.header.opcode {
            op::LOOKUP => self.lookup(request, answer),
            op::FIND => self.find(request, answer),
            op::FORGET | op::BATCH_FORGET => self.forget(request),
            op::GETATTR => self.getattr(request, answer),
            op::SETATTR => self.setattr(request, answer),
            op::READLINK => self.readlink(request, answer),
            op::SYMLINK => self.symlink(request, answer),
            op::MKNOD => self.mknod(request, answer),
            op::MKDIR => self.mkdir(request, answer),
            op::UNLINK => self.unlink(request, answer, AtFlags::empty()),
            op::RMDIR => self.unlink(request, answer, AtFlags::REMOVEDIR),
            op::RENAME => self.rename(request, answer, false),
            op::RENAME2 => self.rename(request, answer, true),
            op::LINK => self.link(request, answer),
            op::OPEN => self.open(request, answer),
            op::CREATE => self.create(request, answer),
            op::TMPFILE => self.tmpfile(request, answer),
            op::OPENDIR_READ => self.opendir_read(request, answer),
            op::RELEASE | op::RELEASEDIR => self.release(request),
            op::READDIR => self.readdir(request, answer, false),
            op::READDIRPLUS => self.readdir(request, answer, true),
            op::SYNCFS => self.syncfs(request),
            op::STATFS => self.statfs(request, answer),
            op::GETXATTR => self.getxattr(request, answer),
            op::LISTXATTR => self.listxattr(request, answer),
            op::SETXATTR => self.setxattr(request),
            op::REMOVEXATTR => self.removexattr(request),
            _ => self.dispatch_open(request, answer),
        }
    }

    /// What is asked of open files.
    fn dispatch_open(&self, request: &mut Request<'_>, answer: &mut Answer) -> Result<(), Failure> {
        match request.header.opcode {
            op::READ => self.read(request, answer),
            op::OPEN_READ => self.open_read(request, answer),
            op::WRITE => self.write(request, answer),
            op::FLUSH => self.flush(request),
            op::FSYNC | op::FSYNCDIR => self.fsync(request),
            op::FALLOCATE => self.fallocate(request),
            op::LSEEK => self.lseek(request, answer),
            op::COPY_FILE_RANGE => self.copy_file_range(request, answer),
            op::GETLK => self.getlk(request, answer),
            op::SETLK => self.setlk(request),
            op::INTERRUPT | op::SIGN => Ok(()),
            _ => Err(Errno::OPNOTSUPP.into()),
        }
    }

    fn forget(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        if request.header.opcode == op::FORGET {
            self.nodes.forget(request.header.nodeid, request.body.u64()?);
            return Ok(());
        }
        let count = request.body.u32()?;
        request.body.u32()?;
        for _ in 0..count {
            self.nodes.forget(request.body.u64()?, request.body.u64()?);
        }
        Ok(())
    }

    fn release(&self, request: &mut Request<'_>) -> Result<(), Failure> {
        let handle = request.body.u64()?;
        let closed = self.handles.remove(handle, request.header.nodeid);
        if let Some(closed) = closed {
            closed.closed();
            self.locks.close(handle, &closed);
            drop(closed);
            self.waits.something_changed();
        }
        Ok(())
    }
}
