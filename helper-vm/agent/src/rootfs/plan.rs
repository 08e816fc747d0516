//! What the root consists of, checked, and the mount options that follow from it.

use std::ffi::CString;
use std::path::{Component, Path, PathBuf};

use vmctr_proto::agent::{self, overlay, root};

/// Overlay's limit on lower folders (OVL_MAX_STACK).
const MAX_LOWERS: usize = 500;

/// What the overlay may leave in its upper folder. Each form is explicit, whatever the kernel's defaults are: the
/// upper folder then means the same to everyone who reads it, and no feature ties it to this guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A container's layer, for tools that know whiteouts and opaque folders only.
    Layer,
    /// An overlay's upper folder, for overlays. Folders can be renamed. There is no index: its entries hold file
    /// handles of the share, which mean nothing once this guest is gone.
    Union,
}

impl Form {
    fn options(self) -> &'static str {
        match self {
            Self::Layer => "index=off,redirect_dir=off,metacopy=off,uuid=off",
            Self::Union => "index=off,redirect_dir=on,metacopy=off,uuid=off,xino=on",
        }
    }
}

/// The host asked for a root that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("the request names no root file system")]
    Nothing,
    #[error("root folder {0:?} is not a plain path below the share")]
    Path(String),
    #[error("an overlay takes 1 to {MAX_LOWERS} lower folders, not {0}")]
    Lowers(usize),
}

/// What to mount; paths are relative to the share and plain.
#[derive(Debug, PartialEq, Eq)]
pub enum RootPlan {
    /// One folder as it is.
    Folder(PathBuf),
    /// Lower folders, topmost first, and where changes go.
    Overlay { lowers: Vec<PathBuf>, upper: Upper },
}

/// Where an overlay's changes go.
#[derive(Debug, PartialEq, Eq)]
pub enum Upper {
    /// Nowhere: the root is read-only.
    None,
    /// Into folders of the share.
    Host { upper: PathBuf, work: PathBuf },
    /// Into a tmpfs; 0 for the kernel's default size.
    Guest { size_bytes: u64 },
}

impl RootPlan {
    /// Checks the host's request.
    pub fn parse(root: Option<&agent::Root>) -> Result<Self, PlanError> {
        match root.and_then(|root| root.kind.as_ref()).ok_or(PlanError::Nothing)? {
            root::Kind::Folder(folder) => plain(folder).map(Self::Folder),
            root::Kind::Overlay(overlay) => Self::overlay(overlay),
        }
    }

    /// Checks the host's request for an overlay.
    pub fn overlay(request: &agent::Overlay) -> Result<Self, PlanError> {
        if !(1..=MAX_LOWERS).contains(&request.lowers.len()) {
            return Err(PlanError::Lowers(request.lowers.len()));
        }
        let lowers = request.lowers.iter().map(|lower| plain(lower)).collect::<Result<_, _>>()?;
        let upper = match &request.upper {
            None => Upper::None,
            Some(overlay::Upper::Host(host)) => {
                Upper::Host { upper: plain(&host.upper)?, work: plain(&host.work)? }
            }
            Some(overlay::Upper::Guest(guest)) => Upper::Guest { size_bytes: guest.size_bytes },
        };
        Ok(Self::Overlay { lowers, upper })
    }
}

fn plain(path: &str) -> Result<PathBuf, PlanError> {
    let candidate = Path::new(path);
    let named = |part: Component| matches!(part, Component::Normal(_));
    if path.is_empty() || path.contains('\0') || !candidate.components().all(named) {
        return Err(PlanError::Path(path.to_owned()));
    }
    Ok(candidate.to_owned())
}

/// Options of an overlay whose folders are named 0, 1, ... and upper, work in the working directory.
pub fn overlay_options(lowers: usize, upper: bool, form: Form) -> CString {
    let names: Vec<_> = (0..lowers).map(|index| index.to_string()).collect();
    let upper = if upper { ",upperdir=upper,workdir=work" } else { "" };
    options(format!("lowerdir={}{upper},{}", names.join(":"), form.options()))
}

/// Options of the tmpfs that takes a guest-side upper folder.
pub fn tmpfs_options(size_bytes: u64) -> CString {
    options(match size_bytes {
        0 => "mode=755".to_owned(),
        size => format!("mode=755,size={size}"),
    })
}

fn options(text: String) -> CString {
    // Built from digits and constants: there is no NUL to refuse.
    CString::new(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmctr_proto::agent::{GuestUpper, HostUpper, Overlay, Root};

    fn root(kind: root::Kind) -> Option<Root> {
        Some(Root { kind: Some(kind) })
    }

    fn overlay(lowers: &[&str], upper: Option<overlay::Upper>) -> Option<Root> {
        let lowers = lowers.iter().map(|&lower| lower.to_owned()).collect();
        root(root::Kind::Overlay(Overlay { lowers, upper }))
    }

    #[test]
    fn paths_stay_below_the_share() {
        for bad in ["", "/", "/etc", "..", "lower/../..", "./lower", "a\0b"] {
            let folder = root(root::Kind::Folder(bad.to_owned()));
            assert!(RootPlan::parse(folder.as_ref()).is_err(), "{bad:?}");
            assert!(RootPlan::parse(overlay(&["lower/0", bad], None).as_ref()).is_err(), "{bad:?}");
        }
        let folder = root(root::Kind::Folder("root".to_owned()));
        assert_eq!(RootPlan::parse(folder.as_ref()).unwrap(), RootPlan::Folder("root".into()));
    }

    #[test]
    fn a_root_is_named_and_an_overlay_has_lowers() {
        assert!(matches!(RootPlan::parse(None), Err(PlanError::Nothing)));
        assert!(matches!(RootPlan::parse(overlay(&[], None).as_ref()), Err(PlanError::Lowers(0))));
        let many = vec!["lower/0"; MAX_LOWERS + 1];
        assert!(matches!(RootPlan::parse(overlay(&many, None).as_ref()), Err(PlanError::Lowers(501))));
    }

    #[test]
    fn each_upper_kind_is_kept() {
        let host = HostUpper { upper: "upper".to_owned(), work: "work".to_owned() };
        let host = overlay(&["lower/0"], Some(overlay::Upper::Host(host)));
        let guest = overlay(&["lower/0"], Some(overlay::Upper::Guest(GuestUpper { size_bytes: 7 })));
        for (request, expected) in [
            (overlay(&["lower/0"], None), Upper::None),
            (host, Upper::Host { upper: "upper".into(), work: "work".into() }),
            (guest, Upper::Guest { size_bytes: 7 }),
        ] {
            let plan = RootPlan::parse(request.as_ref()).unwrap();
            assert_eq!(plan, RootPlan::Overlay { lowers: vec!["lower/0".into()], upper: expected });
        }
    }

    #[test]
    fn options_name_every_folder_once() {
        assert_eq!(
            overlay_options(3, true, Form::Layer).to_str().unwrap(),
            "lowerdir=0:1:2,upperdir=upper,workdir=work,index=off,redirect_dir=off,metacopy=off,uuid=off"
        );
        assert_eq!(tmpfs_options(0).to_str().unwrap(), "mode=755");
        assert_eq!(tmpfs_options(4096).to_str().unwrap(), "mode=755,size=4096");
    }

    proptest! {
        #[test]
        fn options_fit_the_kernels_page(lowers in 1..=MAX_LOWERS, upper: bool) {
            for form in [Form::Layer, Form::Union] {
                prop_assert!(overlay_options(lowers, upper, form).as_bytes_with_nul().len() <= 4096);
            }
        }
    }
}
