//! The guest's side: a FUSE server for one folder, usually an overlay mount.
//!
//! ```text
//!   stream ─ inbox ─ Request ─┬─ entries  names: lookup, create, rename, link, unlink, open
//!                             ├─ folders  listing, with nodes and attributes of all entries
//!                             ├─ data     read, write, sync, holes, copies
//!                             ├─ attrs    attributes, extended ones, the file system's
//!                             ├─ lend     files of the upper folder, for the host to read and write by itself
//!                             └─ locks    flock and fcntl ── waits   those that have to wait
//!                                │
//!                 gate  lets changes wait while a container stands still
//!                 nodes (inode table) · handles (open files) · caller (acting as who asked)
//! ```
//!
//! It runs as root, one thread for each stream. Invariants:
//! 1. What it works on is a descriptor it holds; a name is one component below such a descriptor.
//! 2. What it makes belongs to the caller; whether the caller may, the host's kernel has decided.
//! 3. Devices, fifos and sockets are named, made and removed, never opened.
//!
//! A lower file with several names is one node until a copy-up parts them, as it does with `index=off`. (Where overlay
//! keeps them together, `index=on`, it is copied up under the name that was looked up first; the view is the same.)
//!
//! It does not use virtiofsd's passthrough, which the share does: that has no locks, no O_TMPFILE and no way to
//! its descriptors, takes two files that overlay shows under one inode number for one, and would bring its C
//! libraries into the guest.

mod attrs;
mod caller;
mod data;
mod entries;
mod folders;
mod found;
mod gate;
mod handles;
mod layers;
mod lend;
mod locks;
mod message;
mod nodes;
mod room;
mod server;
mod waits;

pub use gate::{Gate, StillMoving};
pub use layers::Layers;
pub use server::{ServeError, Server};
