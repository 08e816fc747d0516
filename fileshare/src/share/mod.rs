//! The share: one virtiofs daemon per VM that serves one *share root*.
//!
//! ```text
//!  caller                                vmctr-fsd (root, own mount/pid/net/ipc/uts namespaces)
//!  ──────                                ─────────
//!  spawn(spec) ── control socket ──────> supervisor ── fork ──> server
//!     │           spec + listener           │ waits               │ sources   open and check, host's view
//!     │                                     │                     │ mounts    build the root, pivot into it
//!     │ <──────── "ready" or an error ──────┼─────────────────────┤ sandbox   capabilities, seccomp
//!     │                                     │                     │ fs        serve
//!     └─ vhost-user socket ── QEMU ─────────┼────────────────────>│
//! ```
//!
//! What the guest sees (tag `vmctr`):
//!
//! ```text
//!   lower/0..N   the image's layers                      read-only   cached without limit
//!   upper work   where an overlay's changes land         writable    cached without limit; a union's without contents
//!   root         a plain folder as the root, no overlay  either      cached without limit
//!   vol/0..N     folders and single files                either      every look asks the host
//! ```
//!
//! Each folder volume is a file system of its own in the guest (an automount of virtiofs, with its own device
//! number), and so is each layer when layers and top lie on several file systems of the host: inode numbers of
//! two of them would look like hard links. Overlay does not trigger automounts: open `lower/N` before mounting.
//! When all lie on one, as containerd's snapshots do, they share one number, and a file keeps its identity when
//! it is copied up.
//!
//! Invariants:
//! 1. Read-only is a flag of the host's mount; no code of ours has to remember it.
//! 2. The server reaches nothing but the share root: every other mount is gone from its namespace
//!    before the first byte from the guest is read.
//! 3. A special file (device, fifo, socket) is never opened, only created, named, linked and removed.
//!
//! Not offered: locks and inotify between host and guest. Locks (`flock`, `fcntl`) work among the
//! processes of one VM; an inotify watch in the guest does not see what the host changes.

mod control;
pub mod daemon;
pub mod fs;
mod locks;
pub mod mounts;
mod sandbox;
mod seccomp;
pub mod sources;
mod spawn;
mod spec;
mod sys;

pub use control::ControlError;
pub use locks::{LockError, Locks};
pub use spawn::{Connection, Exit, Fsd, SpawnError, spawn, spawn_on};
pub use spec::{SPEC_VERSION, ShareSpec, SpecError, Top, UsedBy, Volume};
