//! `manifest.json` in the guest asset directory: what `vmctr guest build` made and what the VM boots.
//!
//! ```text
//!   DIR/
//!     vmlinux          ELF kernel with a PVH entry, or the distribution's bzImage
//!     initramfs.cpio   uncompressed newc archive: /init (the agent), /modules/*.ko
//!     manifest.json    this; written last, so that a directory with one is complete
//! ```

use serde::{Deserialize, Serialize};

/// File name of the manifest in the asset directory.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Format version of [`GuestManifest`].
pub const MANIFEST_VERSION: u32 = 1;

/// The asset directory's contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestManifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Kernel release as `uname -r` prints it in the guest.
    pub kernel_release: String,
    /// Where the kernel came from: package name and version, or a path.
    pub kernel_source: String,
    /// The kernel image.
    pub kernel: AssetFile,
    /// The initramfs.
    pub initramfs: AssetFile,
    /// Version of the agent in the initramfs.
    pub agent_version: String,
    /// The overlay of the guest was changed so that the other names of a file go on to work when one is removed.
    /// Older manifests do not say so, and it was not.
    #[serde(default)]
    pub hard_links: bool,
    /// Modules in the order in which the agent loads them, without `.ko`.
    pub modules: Vec<String>,
}

/// One file of the asset directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AssetFile {
    /// Name relative to the directory.
    pub file: String,
    /// Bytes.
    pub size: u64,
    /// Lower-case hex.
    pub sha256: String,
}
