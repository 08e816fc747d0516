//! Bind mounts: each source on the host becomes `vol/N` of the share, and the spec's mount points there.
//!
//! Files and folders can be shared. Sockets, FIFOs and devices cannot: what speaks through them runs under
//! the other kernel. Mount propagation from host to container cannot hold either.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use serde_json::{Value, json};
use vmctr_proto::guest_paths::SHARE_DIR;

/// File systems that the guest's kernel makes by itself.
const GUEST_TYPES: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

const PROPAGATION: [&str; 4] = ["shared", "rshared", "slave", "rslave"];

const ID_MAPPING: [&str; 2] = ["idmap", "ridmap"];

/// A file or folder of the host that the container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Resolved path on the host.
    pub source: PathBuf,
    /// The container may not change it.
    pub read_only: bool,
    /// Mounts below the source are seen too.
    pub recursive: bool,
}

/// A mount of the spec cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The list of mounts is no list of mounts.
    #[error("The spec's mounts cannot be read")]
    Malformed(#[source] serde_json::Error),
    /// Nothing there, or it cannot be looked at.
    #[error("Mount {}: cannot use the source {}", destination.display(), path.display())]
    Source {
        /// Where the container would see it.
        destination: PathBuf,
        /// The path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It cannot work through the share.
    #[error("Mount {}: {what} cannot hold in a VM: {hint}", destination.display())]
    Refused {
        /// Where the container would see it.
        destination: PathBuf,
        /// The offending part.
        what: String,
        /// Why, or what to do.
        hint: &'static str,
    },
}

/// Points each bind mount of the spec into the share and returns what to share.
pub fn rewrite(spec: &mut Value, bundle: &Path) -> Result<Vec<Volume>, VolumeError> {
    let mut volumes = Vec::new();
    let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) else { return Ok(volumes) };
    for json in mounts {
        let mount: Mount = serde_json::from_value(json.clone()).map_err(VolumeError::Malformed)?;
        check_options(&mount)?;
        if !is_bind(&mount) {
            check_type(&mount)?;
            continue;
        }
        json["source"] = json!(format!("{SHARE_DIR}/vol/{}", volumes.len()));
        volumes.push(volume(&mount, bundle)?);
    }
    Ok(volumes)
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|option| matches!(option, "bind" | "rbind"))
}

fn refused(mount: &Mount, what: impl Into<String>, hint: &'static str) -> VolumeError {
    VolumeError::Refused { destination: mount.destination().clone(), what: what.into(), hint }
}

fn check_options(mount: &Mount) -> Result<(), VolumeError> {
    let mapped = mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
    if mapped || options(mount).any(|option| ID_MAPPING.contains(&option)) {
        return Err(refused(
            mount,
            "an ID-mapped mount",
            "the share keeps the host's owners; remove the mapping",
        ));
    }
    match options(mount).find(|option| PROPAGATION.contains(option)) {
        Some(option) => {
            let what = format!("mount propagation {option:?}");
            Err(refused(mount, what, "later mounts of the host do not reach the guest; use rprivate"))
        }
        None => Ok(()),
    }
}

fn check_type(mount: &Mount) -> Result<(), VolumeError> {
    let typ = mount.typ().as_deref().unwrap_or_default();
    if GUEST_TYPES.contains(&typ) {
        return Ok(());
    }
    Err(refused(mount, format!("a mount of type {typ:?}"), "mount it on the host and use a bind mount"))
}

fn volume(mount: &Mount, bundle: &Path) -> Result<Volume, VolumeError> {
    let given = mount.source().clone().unwrap_or_default();
    let failed = |source| VolumeError::Source {
        destination: mount.destination().clone(),
        path: given.clone(),
        source,
    };
    let source = fs::canonicalize(bundle.join(&given)).map_err(failed)?;
    let kind = fs::metadata(&source).map_err(failed)?.file_type();
    let unsuitable = if kind.is_socket() {
        Some("a socket")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_block_device() || kind.is_char_device() {
        Some("a device of the host")
    } else {
        None
    };
    if let Some(kind) = unsuitable {
        let what = format!("{kind} ({})", given.display());
        return Err(refused(mount, what, "only files and folders can be shared"));
    }
    Ok(Volume {
        source,
        read_only: options(mount).fold(false, |ro, option| match option {
            "ro" | "rro" => true,
            "rw" => false,
            _ => ro,
        }),
        recursive: options(mount).any(|option| option == "rbind"),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn rewrite_one(mount: &Value, bundle: &Path) -> Result<(Value, Vec<Volume>), VolumeError> {
        let mut spec = json!({"mounts": [mount]});
        let volumes = rewrite(&mut spec, bundle)?;
        Ok((spec["mounts"][0].clone(), volumes))
    }

    #[test]
    fn files_and_folders_become_volumes_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        fs::write(base.join("file"), "").unwrap();
        let mut spec = json!({"mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/a", "type": "bind", "source": base, "options": ["rbind", "rw", "rprivate"]},
            {"destination": "/b", "source": "file", "options": ["bind", "ro", "nosuid"]},
        ]});
        let volumes = rewrite(&mut spec, &base).unwrap();
        let want = [
            Volume { source: base.clone(), read_only: false, recursive: true },
            Volume { source: base.join("file"), read_only: true, recursive: false },
        ];
        assert_eq!(volumes, want);
        assert_eq!(spec["mounts"][0]["source"], "proc");
        assert_eq!(spec["mounts"][1]["source"], "/run/vmctr/share/vol/0");
        assert_eq!(spec["mounts"][2]["source"], "/run/vmctr/share/vol/1");
        assert_eq!(spec["mounts"][2]["options"], json!(["bind", "ro", "nosuid"]));
    }

    #[test]
    fn a_missing_source_is_named() {
        let mount = json!({"destination": "/a", "type": "bind", "source": "/nonexistent/x"});
        let text = rewrite_one(&mount, Path::new("/")).unwrap_err().to_string();
        assert!(text.contains("/nonexistent/x") && text.contains("/a"), "{text}");
    }

    #[test]
    fn what_cannot_cross_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        for (mount, want) in [
            (json!({"destination": "/a", "type": "bind", "source": socket}), "a socket"),
            (json!({"destination": "/a", "type": "bind", "source": "/dev/null"}), "a device of the host"),
            (
                json!({"destination": "/a", "type": "bind", "source": "/", "options": ["rslave"]}),
                "\"rslave\"",
            ),
            (json!({"destination": "/a", "type": "bind", "source": "/", "options": ["idmap"]}), "ID-mapped"),
            (json!({"destination": "/a", "type": "ext4", "source": "/dev/sda1"}), "\"ext4\""),
        ] {
            let text = rewrite_one(&mount, Path::new("/")).unwrap_err().to_string();
            assert!(text.contains(want), "{text} does not say {want}");
        }
    }
}
