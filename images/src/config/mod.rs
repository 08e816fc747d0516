//! An image's config and manifest, edited as JSON: what is not known here stays as it was.
//!
//! ```text
//! base config ── instructions, author, message, diff ID, history ──> config ─ digest ─┐
//! base manifest ── layers, one descriptor more ─────────────────────────────────────> manifest
//! ```

mod image;
mod instruction;
mod media;
mod words;

pub(crate) use image::architecture;
pub use image::{Base, Build, BuildError, Descriptor, Image, build};
pub use instruction::{Instruction, InstructionError};
pub use media::Format;
