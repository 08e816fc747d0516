//! The host's side: the mount, and the relay between the kernel and the guest.
//!
//! ```text
//!   kernel ─ device ─ lane ─┬─ lazy, reading   what need not cross, or crosses joined with the next
//!                           ├─ own ─ served    folders of one lower layer, read by the host
//!                           ├─ lent ─ upper    files of the upper folder, read and written by the host
//!                           ├─ talk ═ stream   question ... answer ─ check ─> kernel
//!                           │   └─ bind        nodes of the host's own that a question is about
//!                           └─ waits ═ stream  locks that are waited for
//! ```
//!
//! What the guest can do to the host is to answer wrongly or not at all. So:
//! 1. No answer reaches the kernel before `check` has measured it by its question; one that fails costs its
//!    request EIO and a line in the log.
//! 2. Nothing but answers is taken from the guest: it has no way to notify, invalidate or store.
//! 3. A guest that is silent, closes or loses count is given up: from then on all is answered EIO, at once.
//! 4. Memory is a buffer for each lane and a bounded store of listings, whatever comes.
//! 5. How long things are remembered, and the flags of open files, are set here.

mod attrs;
mod beneath;
mod bind;
mod check;
mod clock;
mod config;
mod device;
mod evict;
mod export;
mod init;
mod known;
mod lane;
mod layers;
mod lazy;
mod lent;
mod listings;
mod mount;
mod own;
mod pipe;
mod question;
mod reading;
mod regular;
mod served;
mod settle;
mod shared;
mod shortcut;
mod talk;
mod through;
mod upper;
mod waits;

pub use check::{Remember, check};
pub use config::{Cache, Config, Writes};
pub use export::{Export, Figures, StartError, Streams, SyncError};
pub use init::InitError;
pub use mount::{MountError, unmount};
pub use question::Question;
pub use shared::Lost;
