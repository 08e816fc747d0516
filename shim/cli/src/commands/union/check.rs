//! From what was asked for to what can be: a [`Plan`], or why not, before anything is started.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vmctr_fileshare::share::{ShareSpec, Top, UsedBy};

use super::options::Options;
use super::order::Version;
use super::place::Place;
use super::table;

/// Set and removed again to see whether the file system keeps what an overlay writes.
const PROBE: &str = "trusted.overlay.vmctr";

/// A union that can be mounted. Paths are absolute and have no symbolic links.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Of what `mount.json` says of a union, and of the order to the background process.
    version: Version<1>,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Lower folders from the top.
    pub lowers: Vec<PathBuf>,
    /// Where changes land; none: the union is read-only.
    pub top: Option<Changes>,
    /// Words of the mount's options.
    pub options: Vec<String>,
}

/// Where changes land.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Changes {
    /// The upper folder.
    pub upper: PathBuf,
    /// The work folder.
    pub work: PathBuf,
}

/// The union cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Not who may mount.
    #[error("Mounting takes root")]
    NotRoot,
    /// The kernel has no FUSE.
    #[error("Cannot use /dev/fuse: load the kernel's module fuse")]
    Fuse(#[source] io::Error),
    /// A folder is not there.
    #[error("Cannot use the {role} {}", path.display())]
    Folder {
        /// "lower folder", "mountpoint", ...
        role: &'static str,
        /// As given.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("The {role} {} is not a folder", path.display())]
    NotFolder {
        /// "lower folder", "mountpoint", ...
        role: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// It would be sent as text.
    #[error("The name of the {role} {} is not UTF-8", path.display())]
    NotText {
        /// "lower folder", "mountpoint", ...
        role: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// One folder in two places.
    #[error("The {a_role} {} and the {b_role} are the same folder", a.display())]
    Same {
        /// What the first is.
        a_role: &'static str,
        /// The first.
        a: PathBuf,
        /// What the other is.
        b_role: &'static str,
    },
    /// A folder within another.
    #[error("The {inner_role} {} lies inside the {outer_role} {}", inner.display(), outer.display())]
    Inside {
        /// What the inner one is.
        inner_role: &'static str,
        /// The inner one.
        inner: PathBuf,
        /// What the outer one is.
        outer_role: &'static str,
        /// The outer one.
        outer: PathBuf,
    },
    /// One of them would be changed under the other.
    #[error("The {role} {} overlaps the {other_role} {} of the union on {}", path.display(), other.display(), mountpoint.display())]
    Overlaps {
        /// What it is.
        role: &'static str,
        /// The folder.
        path: PathBuf,
        /// What the other one is.
        other_role: &'static str,
        /// The other one.
        other: PathBuf,
        /// Where the other union is mounted.
        mountpoint: PathBuf,
    },
    /// Files cannot be moved from work to upper.
    #[error("The work folder {} is on another mount than the upper folder {}: use one beside it", work.display(), upper.display())]
    OtherMount {
        /// The work folder.
        work: PathBuf,
        /// The upper folder.
        upper: PathBuf,
    },
    /// The file system cannot keep what an overlay writes.
    #[error("The file system of {} keeps no trusted extended attributes, which an overlay needs", .0.display())]
    NoXattrs(PathBuf, #[source] io::Error),
    /// It could, but not here.
    #[error("The work folder {} takes no trusted extended attributes: it is immutable (`lsattr -d` tells), or this process lacks CAP_SYS_ADMIN", .0.display())]
    XattrsForbidden(PathBuf, #[source] io::Error),
    /// What is in it would be hidden.
    #[error("The mountpoint {} is not empty", .0.display())]
    NotEmpty(PathBuf),
}

/// A folder of the union, with what it is for.
struct Folder<'a> {
    role: &'static str,
    path: &'a Path,
    id: (u64, u64),
    /// Behind bind mounts; none when it cannot be known.
    place: Option<Place>,
}

impl Folder<'_> {
    fn overlaps(&self, other: &Self) -> bool {
        let Some((one, other_place)) = self.place.as_ref().zip(other.place.as_ref()) else { return false };
        let changes = self.role != LOWER || other.role != LOWER;
        changes && one != other_place && (one.is_within(other_place) || other_place.is_within(one))
    }
}

const LOWER: &str = "lower folder";
const UPPER: &str = "upper folder";
const WORK: &str = "work folder";
const MOUNTPOINT: &str = "mountpoint";

impl Plan {
    /// Checks everything that can be known before the start.
    pub fn check(options: Options, mountpoint: &Path) -> Result<Self, CheckError> {
        let lowers = options.lowers.iter().map(|path| resolve(LOWER, path)).collect::<Result<_, _>>()?;
        let top = options
            .top
            .map(|(upper, work)| Ok(Changes { upper: resolve(UPPER, &upper)?, work: resolve(WORK, &work)? }));
        let top = top.transpose()?;
        let mountpoint = check_mountpoint(mountpoint)?;
        let plan = Self { version: Version, mountpoint, lowers, top, options: options.words };
        check_apart(&plan.folders()?)?;
        plan.top.as_ref().map_or(Ok(()), Changes::check)?;
        Ok(plan)
    }

    /// What one union changes must not lie in what another one shows.
    pub fn check_beside(&self, other: &Self) -> Result<(), CheckError> {
        let ours = self.folders()?;
        // One may be of another mount namespace: then its path says nothing here.
        for theirs in other.each_folder().flatten() {
            if let Some(one) = ours.iter().find(|one| one.overlaps(&theirs)) {
                return Err(CheckError::Overlaps {
                    role: one.role,
                    path: one.path.to_owned(),
                    other_role: theirs.role,
                    other: theirs.path.to_owned(),
                    mountpoint: other.mountpoint.clone(),
                });
            }
        }
        Ok(())
    }

    /// What the VM gets to see.
    pub fn share(&self) -> ShareSpec {
        let top = self.top.as_ref().map_or(Top::None, |changes| Top::Overlay {
            upper: changes.upper.clone(),
            work: changes.work.clone(),
        });
        ShareSpec { used_by: UsedBy::Union, lowers: self.lowers.clone(), top, ..ShareSpec::new() }
    }

    fn folders(&self) -> Result<Vec<Folder<'_>>, CheckError> {
        self.each_folder().collect()
    }

    fn each_folder<'a>(&'a self) -> impl Iterator<Item = Result<Folder<'a>, CheckError>> {
        let lowers = self.lowers.iter().map(|path| (LOWER, path));
        let top = self.top.iter().flat_map(|top| [(UPPER, &top.upper), (WORK, &top.work)]);
        let table = table::own();
        let folder = move |(role, path): (_, &'a PathBuf)| {
            let meta = metadata(role, path)?;
            let place = Place::find(&table, mount_of(role, path)?, path);
            Ok(Folder { role, path, id: (meta.dev(), meta.ino()), place })
        };
        lowers.chain(top).map(folder)
    }
}

impl Changes {
    fn check(&self) -> Result<(), CheckError> {
        if mount_of(UPPER, &self.upper)? != mount_of(WORK, &self.work)? {
            return Err(CheckError::OtherMount { work: self.work.clone(), upper: self.upper.clone() });
        }
        let probed = rustix::fs::setxattr(&self.work, PROBE, b"y", XattrFlags::empty());
        let probed = probed.and_then(|()| rustix::fs::removexattr(&self.work, PROBE));
        probed.map_err(|errno| no_attributes(self.work.clone(), errno))
    }
}

fn no_attributes(work: PathBuf, errno: Errno) -> CheckError {
    match errno {
        Errno::OPNOTSUPP => CheckError::NoXattrs(work, errno.into()),
        Errno::PERM => CheckError::XattrsForbidden(work, errno.into()),
        _ => CheckError::Folder { role: WORK, path: work, source: errno.into() },
    }
}

/// Whether this user can mount on this host.
pub fn check_host() -> Result<(), CheckError> {
    if !rustix::process::geteuid().is_root() {
        return Err(CheckError::NotRoot);
    }
    fs::File::options().read(true).write(true).open("/dev/fuse").map_err(CheckError::Fuse).map(drop)
}

/// An empty folder to mount on, without symbolic links.
pub fn check_mountpoint(path: &Path) -> Result<PathBuf, CheckError> {
    let mountpoint = resolve(MOUNTPOINT, path)?;
    check_empty(&mountpoint)?;
    Ok(mountpoint)
}

fn resolve(role: &'static str, path: &Path) -> Result<PathBuf, CheckError> {
    let failed = |source| CheckError::Folder { role, path: path.to_owned(), source };
    let path = fs::canonicalize(path).map_err(failed)?;
    if path.to_str().is_none() {
        return Err(CheckError::NotText { role, path });
    }
    if metadata(role, &path)?.is_dir() { Ok(path) } else { Err(CheckError::NotFolder { role, path }) }
}

fn metadata(role: &'static str, path: &Path) -> Result<Metadata, CheckError> {
    fs::metadata(path).map_err(|source| CheckError::Folder { role, path: path.to_owned(), source })
}

/// Overlayfs wants no layer in another one.
fn check_apart(folders: &[Folder<'_>]) -> Result<(), CheckError> {
    for (index, one) in folders.iter().enumerate() {
        for other in &folders[index + 1..] {
            if one.id == other.id {
                return Err(CheckError::Same {
                    a_role: one.role,
                    a: one.path.to_owned(),
                    b_role: other.role,
                });
            }
            check_not_inside(one, other)?;
            check_not_inside(other, one)?;
        }
    }
    Ok(())
}

fn check_not_inside(inner: &Folder<'_>, outer: &Folder<'_>) -> Result<(), CheckError> {
    let bound = inner.place.as_ref().zip(outer.place.as_ref());
    if !inner.path.starts_with(outer.path) && !bound.is_some_and(|(inner, outer)| inner.is_within(outer)) {
        return Ok(());
    }
    Err(CheckError::Inside {
        inner_role: inner.role,
        inner: inner.path.to_owned(),
        outer_role: outer.role,
        outer: outer.path.to_owned(),
    })
}

fn check_empty(mountpoint: &Path) -> Result<(), CheckError> {
    let failed = |source| CheckError::Folder { role: MOUNTPOINT, path: mountpoint.to_owned(), source };
    match fs::read_dir(mountpoint).map_err(failed)?.next() {
        None => Ok(()),
        Some(_) => Err(CheckError::NotEmpty(mountpoint.to_owned())),
    }
}

fn mount_of(role: &'static str, path: &Path) -> Result<u64, CheckError> {
    let statx = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID);
    let failed = |errno: Errno| CheckError::Folder { role, path: path.to_owned(), source: errno.into() };
    Ok(statx.map_err(failed)?.stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            for name in ["low", "up", "work", "mnt", "low/inner"] {
                fs::create_dir(place.0.path().join(name)).unwrap();
            }
            place
        }

        fn check(&self, low: &str, up: &str, work: &str, mnt: &str) -> Result<Plan, CheckError> {
            let at = |name: &str| self.0.path().join(name);
            let options = Options { lowers: vec![at(low)], top: Some((at(up), at(work))), words: vec![] };
            Plan::check(options, &at(mnt))
        }
    }

    #[test]
    fn what_can_be_mounted_passes_and_leaves_no_trace() {
        let place = Place::new();
        let plan = place.check("low", "up", "work", "mnt").unwrap();
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
        let mut name = [0; 64];
        assert!(rustix::fs::getxattr(place.0.path().join("work"), PROBE, &mut name).is_err());
    }

    #[test]
    fn why_the_work_folder_takes_no_attributes_is_told_apart() {
        for (errno, words) in [
            (Errno::OPNOTSUPP, "The file system of /w keeps no trusted"),
            (Errno::PERM, "it is immutable"),
            (Errno::ROFS, "Cannot use the work folder /w"),
            (Errno::NOSPC, "Cannot use the work folder /w"),
        ] {
            let error = no_attributes("/w".into(), errno).to_string();
            assert!(error.contains(words), "{error:?} does not say {words:?}");
        }
    }

    #[test]
    fn what_cannot_is_refused_in_words() {
        let place = Place::new();
        fs::write(place.0.path().join("file"), "").unwrap();
        for (low, up, work, mnt, words) in [
            ("none", "up", "work", "mnt", "Cannot use the lower folder"),
            ("file", "up", "work", "mnt", "is not a folder"),
            ("low", "low/inner", "work", "mnt", "lies inside the lower folder"),
            ("low/inner", "low", "work", "mnt", "lies inside the upper folder"),
            ("low", "up", "up", "mnt", "and the work folder are the same folder"),
            ("low", "up", "low/inner", "mnt", "The work folder"),
            ("low", "up", "work", "low", "is not empty"),
            ("low", "up", "/dev/shm", "mnt", "is on another mount"),
        ] {
            let error = place.check(low, up, work, mnt).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} does not say {words:?}");
        }
    }
}
