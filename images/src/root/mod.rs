//! What a container's root is made of: containerd's root file system mounts, parsed and never mounted.
//!
//! ```text
//!   overlay  lowerdir= upperdir= workdir=   -> Union { lowers, upper }     overlay snapshotter
//!   overlay  lowerdir=                      -> Union, read-only            a view
//!   bind     source                         -> Folder                      native snapshotter, one layer
//!   none     spec.root.path                 -> Folder                      ctr run --rootfs
//!
//!   io.vmctr.upper=guest      host folders become lowers, changes go to the guest's memory
//!   io.vmctr.upper-dir=DIR    a Folder becomes the lower, DIR the upper, .DIR.vmctr-work beside it the work
//! ```
//!
//! An option that changes what the union shows and that the guest would not honour is refused by name.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

mod upper;

pub use upper::{UPPER, UPPER_DIR, UpperChoice, UpperError};

/// A mount as containerd describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// File system.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Its options.
    pub options: Vec<String>,
}

/// What the container's root is made of, as host paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootPlan {
    /// overlayfs in the guest; lowers topmost first.
    Union {
        /// Never empty.
        lowers: Vec<PathBuf>,
        /// Where changes go.
        upper: Upper,
    },
    /// One folder, used and changed as it is.
    Folder {
        /// The folder.
        path: PathBuf,
        /// It may not be changed.
        read_only: bool,
    },
}

/// Where a union's changes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upper {
    /// Nowhere: the union is read-only.
    None,
    /// The guest's memory.
    Guest,
    /// Host folders, on one file system.
    Host {
        /// Takes the changes.
        upper: PathBuf,
        /// overlayfs's own.
        work: PathBuf,
    },
}

/// The mounts cannot be turned into a root.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// More than one mount.
    #[error("The root file system consists of {0} mounts; this runtime takes one (overlay or bind)")]
    Count(usize),
    /// Another file system.
    #[error(
        "Root file system mount of type {0:?} cannot be shared with a VM; use the overlayfs or native snapshotter"
    )]
    Type(String),
    /// An option that would change the union.
    #[error("Root file system mount option {0:?} is not supported")]
    Option(String),
    /// An overlay without a lower, or with half of upper and work.
    #[error("Overlay mount {0}")]
    Incomplete(&'static str),
    /// No root at all.
    #[error("No root file system: the request has no mounts and the spec no root.path")]
    NoRoot,
    /// Not a folder that can be used.
    #[error("Root file system folder {} cannot be used", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Upper of one's own over a union that has one.
    #[error(
        "Annotation io.vmctr.upper-dir needs a plain root folder (ctr run --rootfs), but this root is a snapshot that keeps its changes itself"
    )]
    UpperDirOnUnion,
    /// The upper lies in a lower or around it.
    #[error("Upper folder {} and lower folder {} lie within each other", upper.display(), lower.display())]
    Overlap {
        /// The upper.
        upper: PathBuf,
        /// The lower.
        lower: PathBuf,
    },
}

/// Reads the root from the request's mounts, or from `root_path` when there are none, and applies the
/// choice of the upper.
pub fn plan(mounts: &[Mount], root_path: Option<&Path>, upper: &UpperChoice) -> Result<RootPlan, MountError> {
    let base = match mounts {
        [] => RootPlan::Folder { path: root_path.ok_or(MountError::NoRoot)?.to_owned(), read_only: false },
        [mount] => parse(mount)?,
        more => return Err(MountError::Count(more.len())),
    };
    apply(base, upper)
}

fn parse(mount: &Mount) -> Result<RootPlan, MountError> {
    match mount.kind.as_str() {
        "overlay" => parse_overlay(&mount.options),
        "bind" => parse_bind(mount),
        other => Err(MountError::Type(other.to_owned())),
    }
}

fn parse_bind(mount: &Mount) -> Result<RootPlan, MountError> {
    let mut read_only = false;
    for option in &mount.options {
        match option.as_str() {
            "ro" => read_only = true,
            "rw" => read_only = false,
            "bind" | "rbind" => {}
            other => return Err(MountError::Option(other.to_owned())),
        }
    }
    Ok(RootPlan::Folder { path: PathBuf::from(&mount.source), read_only })
}

#[derive(Default)]
struct OverlayOptions {
    lowers: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    read_only: bool,
}

fn parse_overlay(options: &[String]) -> Result<RootPlan, MountError> {
    let mut parsed = OverlayOptions::default();
    for option in options {
        overlay_option(&mut parsed, option)?;
    }
    if parsed.lowers.is_empty() {
        return Err(MountError::Incomplete("has no lowerdir"));
    }
    let upper = match (parsed.upper, parsed.work) {
        (Some(upper), Some(work)) if !parsed.read_only => Upper::Host { upper, work },
        (Some(upper), Some(_)) => {
            parsed.lowers.insert(0, upper);
            Upper::None
        }
        (None, None) => Upper::None,
        _ => return Err(MountError::Incomplete("has only one of upperdir and workdir")),
    };
    Ok(RootPlan::Union { lowers: parsed.lowers, upper })
}

fn overlay_option(parsed: &mut OverlayOptions, option: &str) -> Result<(), MountError> {
    let (key, value) = option.split_once('=').unwrap_or((option, ""));
    match key {
        "lowerdir" => parsed.lowers = split_escaped(value),
        "lowerdir+" => parsed.lowers.push(PathBuf::from(value)),
        "upperdir" => parsed.upper = Some(unescape(value)),
        "workdir" => parsed.work = Some(unescape(value)),
        "ro" => parsed.read_only = true,
        // How the host's kernel would keep its books; the guest's kernel keeps its own.
        "rw" | "index" | "nfs_export" | "xino" | "uuid" | "volatile" | "fsync" | "noatime" | "relatime" => {}
        "metacopy" | "redirect_dir" if matches!(value, "off" | "nofollow") => {}
        _ => return Err(MountError::Option(option.to_owned())),
    }
    Ok(())
}

/// Splits at colons; a backslash takes the next character as it is, as in the kernel's parser.
fn split_escaped(value: &str) -> Vec<PathBuf> {
    let mut parts = vec![Vec::new()];
    let mut bytes = value.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b':' => parts.push(Vec::new()),
            b'\\' => push_last(&mut parts, bytes.next().unwrap_or(b'\\')),
            other => push_last(&mut parts, other),
        }
    }
    parts.into_iter().filter(|part| !part.is_empty()).map(|part| OsString::from_vec(part).into()).collect()
}

fn push_last(parts: &mut [Vec<u8>], byte: u8) {
    if let Some(last) = parts.last_mut() {
        last.push(byte);
    }
}

fn unescape(value: &str) -> PathBuf {
    let mut out = Vec::with_capacity(value.len());
    let mut bytes = value.bytes();
    while let Some(byte) = bytes.next() {
        out.push(if byte == b'\\' { bytes.next().unwrap_or(b'\\') } else { byte });
    }
    OsString::from_vec(out).into()
}

fn apply(base: RootPlan, choice: &UpperChoice) -> Result<RootPlan, MountError> {
    match (choice, base) {
        (UpperChoice::Host, base) => Ok(base),
        (UpperChoice::Guest, RootPlan::Folder { path, .. }) => {
            Ok(RootPlan::Union { lowers: vec![path], upper: Upper::Guest })
        }
        (UpperChoice::Guest, RootPlan::Union { mut lowers, upper }) => {
            if let Upper::Host { upper, .. } = upper {
                lowers.insert(0, upper);
            }
            Ok(RootPlan::Union { lowers, upper: Upper::Guest })
        }
        (UpperChoice::HostDir(_), RootPlan::Union { .. }) => Err(MountError::UpperDirOnUnion),
        (UpperChoice::HostDir(dir), RootPlan::Folder { path, .. }) => Ok(over_folder(path, dir)),
    }
}

fn over_folder(lower: PathBuf, upper: &Path) -> RootPlan {
    let work = work_dir(upper);
    RootPlan::Union { lowers: vec![lower], upper: Upper::Host { upper: upper.to_owned(), work } }
}

/// The hidden sibling that overlayfs works in: on the same file system as the upper.
pub fn work_dir(upper: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(upper.file_name().unwrap_or_default());
    name.push(".vmctr-work");
    upper.with_file_name(name)
}

impl RootPlan {
    /// Fails by name unless each folder is there and can be read. `work` of an upper-dir may be missing:
    /// it is made later.
    pub fn check(&self) -> Result<(), MountError> {
        match self {
            Self::Folder { path, .. } => check_folder(path),
            Self::Union { lowers, upper } => {
                lowers.iter().try_for_each(|lower| check_folder(lower))?;
                match upper {
                    Upper::Host { upper, .. } => {
                        check_folder(upper)?;
                        lowers.iter().try_for_each(|lower| check_apart(lower, upper))
                    }
                    Upper::None | Upper::Guest => Ok(()),
                }
            }
        }
    }
}

/// By what the paths lead to: neither a link nor `..` hides that changes would go into the layer itself.
fn check_apart(lower: &Path, upper: &Path) -> Result<(), MountError> {
    let real = |path: &Path| {
        path.canonicalize().map_err(|source| MountError::Folder { path: path.to_owned(), source })
    };
    let (real_lower, real_upper) = (real(lower)?, real(upper)?);
    if real_upper.starts_with(&real_lower) || real_lower.starts_with(&real_upper) {
        return Err(MountError::Overlap { upper: upper.to_owned(), lower: lower.to_owned() });
    }
    Ok(())
}

fn check_folder(path: &Path) -> Result<(), MountError> {
    let fail = |source| MountError::Folder { path: path.to_owned(), source };
    if !path.as_os_str().as_bytes().starts_with(b"/") {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it is not an absolute path")));
    }
    fs::read_dir(path).map(drop).map_err(fail)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mount(typ: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            kind: typ.into(),
            source: source.into(),
            options: options.iter().map(ToString::to_string).collect(),
        }
    }

    fn paths(list: &[&str]) -> Vec<PathBuf> {
        list.iter().map(PathBuf::from).collect()
    }

    fn plan_one(mount: Mount, upper: &UpperChoice) -> Result<RootPlan, MountError> {
        plan(&[mount], Some(Path::new("/bundle/rootfs")), upper)
    }

    fn folder(path: &str, read_only: bool) -> RootPlan {
        RootPlan::Folder { path: path.into(), read_only }
    }

    fn snapshot() -> Mount {
        mount(
            "overlay",
            "overlay",
            &["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"],
        )
    }

    #[test]
    fn a_snapshot_becomes_a_union() {
        let upper = Upper::Host { upper: "/s/3/fs".into(), work: "/s/3/work".into() };
        let want = RootPlan::Union { lowers: paths(&["/s/2/fs", "/s/1/fs"]), upper };
        assert_eq!(plan_one(snapshot(), &UpperChoice::Host).unwrap(), want);
    }

    #[test]
    fn views_are_read_only() {
        let view = mount("overlay", "overlay", &["lowerdir=/2:/1"]);
        let want = RootPlan::Union { lowers: paths(&["/2", "/1"]), upper: Upper::None };
        assert_eq!(plan_one(view, &UpperChoice::Host).unwrap(), want);
        let one_layer = mount("bind", "/1", &["ro", "rbind"]);
        assert_eq!(plan_one(one_layer, &UpperChoice::Host).unwrap(), folder("/1", true));
        let read_only = mount("overlay", "overlay", &["ro", "lowerdir=/1", "upperdir=/u", "workdir=/w"]);
        let want = RootPlan::Union { lowers: paths(&["/u", "/1"]), upper: Upper::None };
        assert_eq!(plan_one(read_only, &UpperChoice::Host).unwrap(), want);
    }

    #[test]
    fn a_bind_mount_and_no_mount_are_folders() {
        let bind = mount("bind", "/s/1/fs", &["rw", "rbind"]);
        assert_eq!(plan_one(bind, &UpperChoice::Host).unwrap(), folder("/s/1/fs", false));
        let root = plan(&[], Some(Path::new("/root")), &UpperChoice::Host).unwrap();
        assert_eq!(root, folder("/root", false));
        assert!(matches!(plan(&[], None, &UpperChoice::Host), Err(MountError::NoRoot)));
    }

    #[test]
    fn changes_go_where_the_annotation_says() {
        let lowers = paths(&["/s/3/fs", "/s/2/fs", "/s/1/fs"]);
        let want = RootPlan::Union { lowers, upper: Upper::Guest };
        assert_eq!(plan_one(snapshot(), &UpperChoice::Guest).unwrap(), want);

        let dir = UpperChoice::HostDir("/srv/new".into());
        let upper = Upper::Host { upper: "/srv/new".into(), work: "/srv/.new.vmctr-work".into() };
        let want = RootPlan::Union { lowers: paths(&["/root"]), upper };
        assert_eq!(plan(&[], Some(Path::new("/root")), &dir).unwrap(), want);
        assert!(matches!(plan_one(snapshot(), &dir), Err(MountError::UpperDirOnUnion)));
    }

    #[test]
    fn changes_do_not_go_into_the_layer() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("root/inner")).unwrap();
        fs::create_dir(at("new")).unwrap();
        std::os::unix::fs::symlink(at("root/inner"), at("link")).unwrap();
        let check =
            |upper: PathBuf| plan(&[], Some(&at("root")), &UpperChoice::HostDir(upper)).unwrap().check();
        check(at("new")).unwrap();
        check(at("root/../new")).unwrap();
        for overlapping in ["root", "root/inner", "new/../root/inner", "link"] {
            assert!(matches!(check(at(overlapping)), Err(MountError::Overlap { .. })), "{overlapping}");
        }
        assert!(matches!(check(dir.path().to_owned()), Err(MountError::Overlap { .. })));
    }

    #[test]
    fn what_the_guest_would_not_honour_is_refused_by_name() {
        for option in ["userxattr", "metacopy=on", "redirect_dir=on", "uidmap=0:1:2", "verity=on"] {
            let mount = mount("overlay", "overlay", &["lowerdir=/1", option]);
            let text = plan_one(mount, &UpperChoice::Host).unwrap_err().to_string();
            assert!(text.contains(option), "{text}");
        }
        let bind = mount("bind", "/x", &["noexec"]);
        assert!(plan_one(bind, &UpperChoice::Host).unwrap_err().to_string().contains("noexec"));
        let other = mount("ext4", "/dev/sda", &[]);
        assert!(plan_one(other, &UpperChoice::Host).unwrap_err().to_string().contains("ext4"));
        let half = mount("overlay", "overlay", &["lowerdir=/1", "upperdir=/u"]);
        assert!(matches!(plan_one(half, &UpperChoice::Host), Err(MountError::Incomplete(_))));
        let two = plan(&[snapshot(), snapshot()], None, &UpperChoice::Host);
        assert!(matches!(two, Err(MountError::Count(2))));
    }

    #[test]
    fn missing_and_unusable_folders_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let union = |lower: &Path| RootPlan::Union {
            lowers: vec![dir.path().to_owned(), lower.to_owned()],
            upper: Upper::None,
        };
        assert!(union(dir.path()).check().is_ok());
        for bad in [dir.path().join("missing"), file, PathBuf::from("relative")] {
            let error = union(&bad).check().unwrap_err();
            assert!(error.to_string().contains(bad.to_str().unwrap()), "{error}");
        }
    }

    proptest! {
        /// Escaping as mount(8) does and splitting give the paths back, whatever is in them.
        #[test]
        fn escaped_lowers_round_trip(names in proptest::collection::vec("/[a-z:,\\\\ ]{1,12}", 1..5)) {
            let escaped: Vec<_> =
                names.iter().map(|name| name.replace('\\', "\\\\").replace(':', "\\:")).collect();
            let want: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
            prop_assert_eq!(split_escaped(&escaped.join(":")), want);
        }
    }
}
