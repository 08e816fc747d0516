//! Where bind mounts land: their destinations, followed through the image's own links.
//!
//! ```text
//!   image      /etc/resolv.conf -> ../run/systemd/resolve/stub.conf, which no image holds
//!   spec       bind at /etc/resolv.conf, tmpfs at /run
//!   becomes    bind at /run/systemd/resolve/stub.conf, made in the tmpfs
//! ```
//!
//! libcontainer makes missing mount points, but not behind a link that leads nowhere yet; other runtimes do.
//! Links below another mount are not the image's to follow. File systems other than bind mounts keep their
//! destinations: libcontainer refuses a `/proc` that is a link, and must see it.
//!
//! Nothing runs in the root yet, so what was followed stays true.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use anyhow::Context;
use libcontainer::oci_spec::runtime::{Mount, Spec};
use pathrs::Root;

use crate::rootfs::ROOTFS;

/// The kernel's own limit on links in one path.
const MAX_LINKS: usize = 40;

/// Rewrites the destinations in the bundle's spec.
pub fn settle(dir: &Path) -> anyhow::Result<()> {
    let file = dir.join("config.json");
    let mut spec = Spec::load(&file)?;
    let Some(mut mounts) = spec.mounts().clone() else { return Ok(()) };
    let root = Root::open(dir.join(ROOTFS))?;
    let points: Vec<PathBuf> = mounts.iter().map(|mount| mount.destination().clone()).collect();
    for mount in mounts.iter_mut().filter(|mount| is_bind(mount)) {
        let covered =
            |path: &Path| points.iter().any(|point| point != mount.destination() && path.starts_with(point));
        let settled =
            follow(mount.destination(), |path| if covered(path) { None } else { root.readlink(path).ok() });
        mount.set_destination(settled);
    }
    spec.set_mounts(Some(mounts));
    spec.save(&file).context("rewriting the mount points")
}

fn is_bind(mount: &Mount) -> bool {
    let asked = mount.options().iter().flatten().any(|option| matches!(option.as_str(), "bind" | "rbind"));
    asked || mount.typ().as_deref() == Some("bind")
}

/// The path without links, `.` and `..`; what is not there stays as it is. `read_link` gets paths whose
/// parents are no links.
fn follow(path: &Path, read_link: impl Fn(&Path) -> Option<PathBuf>) -> PathBuf {
    let mut done = PathBuf::from("/");
    let mut left: Vec<OsString> = parts(path);
    let mut links = 0;
    while let Some(part) = left.pop() {
        match part.as_bytes() {
            b"/" => done = PathBuf::from("/"),
            b".." => drop(done.pop()),
            _ => {
                let next = done.join(&part);
                match read_link(&next).filter(|_| links < MAX_LINKS) {
                    Some(target) => {
                        links += 1;
                        left.extend(parts(&target));
                    }
                    None => done = next,
                }
            }
        }
    }
    done
}

/// The components, the first one last.
fn parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().filter(|part| *part != Component::CurDir);
    parts.map(|part| part.as_os_str().to_owned()).rev().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    fn followed(path: &str, links: &[(&str, &str)]) -> String {
        let links: HashMap<_, _> = links.iter().map(|(at, to)| (Path::new(at), PathBuf::from(to))).collect();
        follow(Path::new(path), |path| links.get(path).cloned()).display().to_string()
    }

    #[test]
    fn links_are_followed_within_the_root() {
        let links = [("/etc/resolv.conf", "../run/stub"), ("/var/run", "/run"), ("/up", "../../../etc")];
        assert_eq!(followed("/etc/resolv.conf", &links), "/run/stub");
        assert_eq!(followed("/var/run/secrets/x", &links), "/run/secrets/x");
        assert_eq!(followed("/up/resolv.conf", &links), "/run/stub");
        assert_eq!(followed("/x/../y/./z", &links), "/y/z");
        assert_eq!(followed("/../..", &links), "/");
    }

    #[test]
    fn a_loop_ends() {
        assert_eq!(followed("/a/f", &[("/a", "b"), ("/b", "a")]), "/a/f");
    }

    #[test]
    fn only_bind_mounts_move_and_only_by_the_images_own_links() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join(ROOTFS);
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("run")).unwrap();
        symlink("../run/stub", root.join("etc/resolv.conf")).unwrap();
        symlink("/elsewhere", root.join("run/stub")).unwrap();
        symlink("/etc", root.join("proc")).unwrap();
        let spec = json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/etc/resolv.conf", "source": "/s", "options": ["bind"]},
            {"destination": "/plain", "type": "bind", "source": "/s"},
        ]});
        fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        settle(dir.path()).unwrap();
        let settled = Spec::load(dir.path().join("config.json")).unwrap();
        let points: Vec<_> =
            settled.mounts().iter().flatten().map(|m| m.destination().display().to_string()).collect();
        assert_eq!(points, ["/proc", "/run", "/run/stub", "/plain"]);
    }
}
