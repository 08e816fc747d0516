//! What crosses between host and guest: the kernel's own FUSE messages, on a few streams.
//!
//! ```text
//!   hello     ─ host: version, lane, features    ─ guest: version, status, features
//!   then      ─ request  fuse_in_header  + body  (header.len bytes)   host → guest
//!             ─ answer   fuse_out_header + body  (header.len bytes)   guest → host
//! ```
//!
//! Each relay thread of the host has a stream of its own and takes turns on it: one request, its answer, the
//! next. So an answer can only belong to the request before it, one thread carries a request from the kernel to
//! the guest and back without waking another, and the memory in use is a buffer per thread. Requests that may
//! wait without limit (SETLKW) go over one more stream, where answers come in any order.
//!
//! Seven things differ from what the kernel sends and wants:
//! 1. Releases are not answered ([`abi::is_silent`]).
//! 2. Answers carry no times to remember entries and attributes, no flags for open files: the host decides.
//! 3. Opening for reading and opening a folder are joined with the first reading of them ([`abi::op::OPEN_READ`],
//!    [`abi::op::OPENDIR_READ`]): the host opens nothing in the guest before it is read.
//! 4. After a successful change of a folder its attributes follow the kernel's answer ([`abi::folders_after`]).
//! 5. With a folder that lies in one lower layer only comes where ([`abi::PURE`]).
//! 6. Nodes that the host gave the kernel by itself are found in one request ([`abi::op::FIND`]) before anything else
//!    is asked of them. What is asked may follow at once and name them by their place in it ([`abi::FOUND`]).
//! 7. Where both sides agree ([`abi::feature::LEND`]), a file that is opened or made may come with its place in the
//!    upper folder ([`lent`]).

pub mod abi;
pub mod codec;
pub mod hello;
pub mod lent;
pub mod stream;
