//! One descriptor of the kernel's FUSE device.
//!
//! Invariant: a request that was read is answered once. An answer that the kernel does not want any more (its
//! caller is gone, the mount is gone) is no error.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;

use crate::export::sys::{self, Backing};
use crate::export::wire::abi::{OUT_HEADER, OutHeader};
use crate::export::wire::codec::Put;

/// `FUSE_NOTIFY_INVAL_ENTRY`, which stands where answers have their error.
const NOTIFY_INVAL_ENTRY: i32 = 3;

/// `FUSE_NOTIFY_PRUNE`.
const NOTIFY_PRUNE: i32 = 9;

/// A descriptor of a connection to the kernel.
#[derive(Debug)]
pub(super) struct Device(pub(super) OwnedFd);

/// The mount is gone, or was cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone;

impl Device {
    /// A descriptor that has no connection yet.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self(rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// A further descriptor of the same connection, for another thread.
    pub(super) fn another(&self) -> io::Result<Self> {
        let other = Self::open()?;
        sys::clone_connection(&other.0, &self.0)?;
        Ok(other)
    }

    /// Has the kernel keep a file for opens to mean; `None` if it does not want to, as where the file lies on a
    /// stacked file system, or without CAP_SYS_ADMIN.
    pub(super) fn register(&self, file: &OwnedFd) -> Option<Backing> {
        sys::backing_open(&self.0, file)
            .inspect_err(|error| tracing::debug!(%error, "a file is not read by the kernel itself"))
            .ok()
    }

    /// Takes a kept file back.
    pub(super) fn unregister(&self, backing: &Backing) {
        if let Err(error) = sys::backing_close(&self.0, backing) {
            tracing::warn!(%error, "the kernel keeps a file of a layer open");
        }
    }

    /// Waits for the next request.
    pub(super) fn next<'a>(&self, buffer: &'a mut [u8]) -> Result<&'a mut [u8], Gone> {
        loop {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(length) => return Ok(&mut buffer[..length]),
                // A request whose caller left before it could be read.
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::NODEV | Errno::CONNABORTED) => return Err(Gone),
                Err(errno) => {
                    tracing::error!(%errno, "cannot read requests from the kernel");
                    return Err(Gone);
                }
            }
        }
    }

    /// Hands an answer to the kernel.
    pub(super) fn answer(&self, message: &[u8]) {
        self.report(rustix::io::write(&self.0, message));
    }

    /// Answers without a body: 0 for success.
    pub(super) fn answer_errno(&self, unique: u64, errno: i32) {
        let mut message = Vec::with_capacity(OUT_HEADER);
        OutHeader { len: OUT_HEADER as u32, error: -errno, unique }.put(&mut message);
        self.answer(&message);
    }

    /// Answers with a body.
    pub(super) fn answer_body(&self, unique: u64, body: &[u8]) {
        let mut header = Vec::with_capacity(OUT_HEADER);
        OutHeader { len: (OUT_HEADER + body.len()) as u32, error: 0, unique }.put(&mut header);
        self.report(rustix::io::writev(&self.0, &[IoSlice::new(&header), IoSlice::new(body)]));
    }

    /// Answers with the `length` bytes that are in a pipe; tells how many the kernel took. If it took none, the answer
    /// is to be given once more otherwise.
    pub(super) fn splice(&self, pipe: &OwnedFd, length: usize) -> Result<usize, Errno> {
        rustix::pipe::splice(pipe, None, &self.0, None, length, SpliceFlags::empty())
    }

    /// Has the kernel ask for a file's attributes the next time, and so for its size.
    pub(super) fn forget_attributes(&self, nodeid: u64) {
        /// `FUSE_NOTIFY_INVAL_INODE`, which stands where an answer has its error.
        const INVAL_INODE: i32 = 2;
        const LENGTH: usize = OUT_HEADER + 24;
        let mut message = Vec::with_capacity(LENGTH);
        OutHeader { len: LENGTH as u32, error: INVAL_INODE, unique: 0 }.put(&mut message);
        // From an offset before the file's beginning: its contents stay.
        message.u64(nodeid).u64(u64::MAX).u64(0);
        self.answer(&message);
    }

    /// Asks the kernel to forget nodes that nothing uses; `false` if it cannot be asked that: before Linux 6.18.
    pub(super) fn prune(&self, nodes: &[u64]) -> Result<bool, Gone> {
        let mut message = Vec::with_capacity(OUT_HEADER + 16 + nodes.len() * 8);
        let len = (OUT_HEADER + 16 + nodes.len() * 8) as u32;
        OutHeader { len, error: NOTIFY_PRUNE, unique: 0 }.put(&mut message);
        message.u32(nodes.len() as u32).u32(0).u64(0);
        for node in nodes {
            message.u64(*node);
        }
        match rustix::io::write(&self.0, &message) {
            Err(Errno::NODEV | Errno::CONNABORTED | Errno::NOTCONN | Errno::PERM) => Err(Gone),
            written => Ok(written.is_ok()),
        }
    }

    /// Asks the kernel to forget what it knows under a name.
    pub(super) fn forget_name(&self, folder: u64, name: &[u8]) -> Result<(), Gone> {
        let mut message = Vec::with_capacity(OUT_HEADER + 16 + name.len() + 1);
        let len = (OUT_HEADER + 16 + name.len() + 1) as u32;
        OutHeader { len, error: NOTIFY_INVAL_ENTRY, unique: 0 }.put(&mut message);
        message.u64(folder).u32(name.len() as u32).u32(0).bytes(name).bytes(&[0]);
        match rustix::io::write(&self.0, &message) {
            Err(Errno::NODEV | Errno::CONNABORTED | Errno::NOTCONN | Errno::PERM) => Err(Gone),
            // It did not know it, or has it forgotten by now.
            _ => Ok(()),
        }
    }

    fn report(&self, written: rustix::io::Result<usize>) {
        match written {
            // The request is no longer there, or the mount is not.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => {}
            Err(errno) => tracing::error!(%errno, "the kernel refused an answer"),
        }
    }
}
