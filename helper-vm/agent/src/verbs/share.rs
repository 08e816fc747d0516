//! MountShare and Flush: the folders that the host gives to this VM.

use std::fs::{self, File};

use rustix::fs::syncfs;
use rustix::mount::{MountFlags, mount};
use vmctr_proto::agent::MountShareRequest;
use vmctr_proto::guest_paths::SHARE_DIR;

use super::{Error, Result, blocking, io_error};
use crate::devices;
use crate::guest::{Guest, Handle};

/// Longest tag that a virtiofs device has (virtio specification, section 5.11.4).
const MAX_TAG: usize = 36;

/// Mounts the share; a second time with the same tag does nothing.
pub async fn mount_share(guest: Handle, request: MountShareRequest) -> Result<()> {
    let tag = request.tag;
    if tag.is_empty() || tag.len() > MAX_TAG || tag.contains('\0') {
        return Err(Error::Argument(format!("a virtiofs tag has 1 to {MAX_TAG} bytes, not {tag:?}")));
    }
    let wanted = tag.clone();
    if !guest.call(move |guest| begin(guest, wanted)).await? {
        return Ok(());
    }
    let outcome = blocking(move || mount_at_share_dir(&tag)).await;
    if outcome.is_err() {
        guest.call(|guest| guest.share = None).await;
    }
    outcome
}

/// Whether there is something to mount.
fn begin(guest: &mut Guest, tag: String) -> Result<bool> {
    match &guest.share {
        None => {
            guest.share = Some(tag);
            Ok(true)
        }
        Some(mounted) if *mounted == tag => Ok(false),
        Some(_) => {
            let why = "another share is mounted";
            Err(Error::Busy { what: format!("share {tag}"), verb: "mounted", why })
        }
    }
}

fn mount_at_share_dir(tag: &str) -> Result<()> {
    fs::create_dir_all(SHARE_DIR).map_err(io_error(SHARE_DIR))?;
    // No flags: a root folder's mount has those of the share, and a root may hold set-user-ID programs.
    let mounted = || mount(tag, SHARE_DIR, "virtiofs", MountFlags::empty(), None);
    let mounted = mounted().or_else(|_| {
        // A device that was plugged in a moment ago.
        devices::look()?;
        Ok::<_, std::io::Error>(mounted()?)
    });
    mounted.map_err(|error| Error::Io(format!("mounting share {tag:?}"), error))
}

/// Writes everything that is dirty back to the host.
pub async fn flush(guest: Handle) -> Result<()> {
    if guest.call(|guest| guest.share.is_none()).await {
        return Ok(());
    }
    blocking(|| {
        let share = File::open(SHARE_DIR).map_err(io_error(SHARE_DIR))?;
        syncfs(&share).map_err(|error| Error::Io("writing the share back".to_owned(), error.into()))
    })
    .await
}
