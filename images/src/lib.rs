//! Images of containers: what a container changed, as a folder and as an OCI layer.
//!
//! This crate knows nothing of the VM.

mod behind;
mod beneath;
pub mod commit;
pub mod config;
pub mod digest;
pub mod layer;
pub mod meta;
pub mod path;
pub mod root;
pub mod store;
pub mod tree;
pub mod upper;
pub mod verify;
