//! Changes of owner that take nothing else away.
//!
//! chown(2) takes set-ID bits and capabilities from a file. Whether they are to go is for the guest's kernel to say,
//! which does so in requests of its own: when an overlay copies a file up, it sets the mode and the capabilities
//! first and the owner last.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{Context, FileSystem, GetxattrReply, SetattrValid, SetxattrFlags};
use virtiofsd::fuse;
use virtiofsd::passthrough::PassthroughFs;

const CAPABILITIES: &CStr = c"security.capability";

/// Longer than the kernel lets one be.
const LONGEST: u32 = 256;

const SET_IDS: u32 = libc::S_ISUID | libc::S_ISGID;

/// What a file may lose to a change of its owner.
pub(super) struct Kept {
    mode: Option<u32>,
    capabilities: Option<Vec<u8>>,
}

impl Kept {
    /// Looks at a file before a change; `None` if the change takes nothing.
    pub(super) fn before(fs: &PassthroughFs, ctx: Context, inode: u64, valid: SetattrValid) -> Option<Self> {
        if !valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            return None;
        }
        let (attr, _) = fs.getattr(ctx, inode, None).ok()?;
        if attr.mode & libc::S_IFMT != libc::S_IFREG {
            return None;
        }
        let mode = (attr.mode & SET_IDS != 0 && !valid.contains(SetattrValid::MODE)).then_some(attr.mode);
        let capabilities = match fs.getxattr(ctx, inode, CAPABILITIES, LONGEST) {
            Ok(GetxattrReply::Value(value)) => Some(value),
            _ => None,
        };
        (mode.is_some() || capabilities.is_some()).then_some(Self { mode, capabilities })
    }

    /// Gives back what the change took; tells how the file is then.
    pub(super) fn restore(
        self,
        fs: &PassthroughFs,
        ctx: Context,
        inode: u64,
    ) -> io::Result<(fuse::Attr, Duration)> {
        if let Some(value) = &self.capabilities {
            fs.setxattr(ctx, inode, CAPABILITIES, value, 0, SetxattrFlags::empty())?;
        }
        match self.mode {
            Some(mode) => {
                let attr = fuse::SetattrIn { mode, ..Default::default() };
                fs.setattr(ctx, inode, attr, None, SetattrValid::MODE)
            }
            None => fs.getattr(ctx, inode, None),
        }
    }
}
