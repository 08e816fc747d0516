//! The options of a union mount, as mount(8) and overlayfs write them.
//!
//! ```text
//!   lowerdir=A:B\:b,upperdir=U,workdir=W,ro,noexec
//!            │ │     a backslash takes the meaning from the colon, comma or backslash behind it
//!            └─┴──── from the top
//! ```
//!
//! Invariant: what is not understood is refused by name; nothing is ignored but what fstab has for others, and what asks
//! for no more than there is.

use std::path::PathBuf;

use rustix::mount::MountAttrFlags;

/// Overlayfs takes at most 500 lower layers (Linux `OVL_MAX_STACK`).
const MAX_LOWERS: usize = 500;

/// What the options ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Lower folders from the top, one at least.
    pub lowers: Vec<PathBuf>,
    /// Upper and work folder.
    pub top: Option<(PathBuf, PathBuf)>,
    /// Words that change how it is mounted, in the order given.
    pub words: Vec<String>,
}

/// The options cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Nobody knows it.
    #[error("Option {0:?} is not known")]
    Unknown(String),
    /// It would change a mount that is there.
    #[error("A union cannot be remounted: unmount it, and mount it with the other options")]
    Remount,
    /// It promises what a union does not keep.
    #[error(
        "Option {0} is not possible: what is written to a union is on disk after fsync(2) and when it is unmounted"
    )]
    Impossible(String),
    /// There is nothing to unite.
    #[error("Option lowerdir= is missing: a union needs a lower folder")]
    NoLower,
    /// More than overlayfs takes.
    #[error("{0} lower folders; at most {MAX_LOWERS} are possible")]
    TooMany(usize),
    /// `lowerdir=A::B`, which overlayfs has for data-only layers.
    #[error("Option lowerdir= has an empty name between two colons")]
    EmptyLower,
    /// It stands there twice.
    #[error("Option {0}= is given twice")]
    Twice(&'static str),
    /// Only one of the two.
    #[error("Option {0}= is missing: upperdir= and workdir= go together")]
    Half(&'static str),
}

impl Options {
    /// Parses a list of options.
    pub fn parse(text: &str) -> Result<Self, OptionsError> {
        let (mut lowers, mut upper, mut work) = (None, None, None);
        let mut words = Vec::new();
        let given = split(text, ',');
        // The others may be those of the mount that is there, as mount(8) has read them.
        if given.contains(&"remount") {
            return Err(OptionsError::Remount);
        }
        for option in given.into_iter().filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("lowerdir", value)) => once("lowerdir", &mut lowers, lower_folders(value)?)?,
                Some(("upperdir", value)) => once("upperdir", &mut upper, unescape(value).into())?,
                Some(("workdir", value)) => once("workdir", &mut work, unescape(value).into())?,
                _ if is_for_others(option) || changes_nothing(option) => {}
                _ if matches!(option, "sync" | "dirsync") => {
                    return Err(OptionsError::Impossible(option.to_owned()));
                }
                _ if is_word(option) => words.push(option.to_owned()),
                _ => return Err(OptionsError::Unknown(option.to_owned())),
            }
        }
        let top = match (upper, work) {
            (Some(upper), Some(work)) => Some((upper, work)),
            (None, None) => None,
            (Some(_), None) => return Err(OptionsError::Half("workdir")),
            (None, Some(_)) => return Err(OptionsError::Half("upperdir")),
        };
        Ok(Self { lowers: lowers.ok_or(OptionsError::NoLower)?, top, words })
    }
}

/// Restrictions of the mount that the words mean; the last of two that contradict counts. Set-user-ID programs
/// and devices are refused unless asked for.
pub fn restrictions(words: &[String]) -> MountAttrFlags {
    words.iter().filter_map(|word| attribute(word)).fold(usual(), |all, (mask, set)| (all - mask) | set)
}

fn usual() -> MountAttrFlags {
    MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV
}

/// Whether lower files may be read, and upper ones read and written, on the host.
pub fn reads_on_host(words: &[String]) -> bool {
    !words.iter().any(|word| word == NO_PASSTHROUGH)
}

/// Whether it wants a VM of its own.
pub fn own_vm(words: &[String]) -> bool {
    words.iter().any(|word| word == OWN_VM)
}

/// The option for [`own_vm`].
pub const OWN_VM: &str = "own_vm";

const NO_PASSTHROUGH: &str = "nopassthrough";

/// What a word clears, and what it then sets.
fn attribute(word: &str) -> Option<(MountAttrFlags, MountAttrFlags)> {
    use MountAttrFlags as Attr;
    let on = |flag: Attr| Some((flag, flag));
    let off = |flag: Attr| Some((flag, Attr::empty()));
    // Access times are a field, not single bits.
    let times = Attr::MOUNT_ATTR_NOATIME | Attr::MOUNT_ATTR_STRICTATIME;
    match word {
        "ro" => on(Attr::MOUNT_ATTR_RDONLY),
        "rw" => off(Attr::MOUNT_ATTR_RDONLY),
        "nosuid" => on(Attr::MOUNT_ATTR_NOSUID),
        "suid" => off(Attr::MOUNT_ATTR_NOSUID),
        "nodev" => on(Attr::MOUNT_ATTR_NODEV),
        "dev" => off(Attr::MOUNT_ATTR_NODEV),
        "noexec" => on(Attr::MOUNT_ATTR_NOEXEC),
        // Who else may mount it is for mount(8) to say; these are what it means for the mount.
        "user" | "users" => on(usual() | Attr::MOUNT_ATTR_NOEXEC),
        _ if word.starts_with("user=") => attribute("user"),
        "owner" | "group" => on(usual()),
        "symfollow" => off(Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "nosymfollow" => on(Attr::MOUNT_ATTR_NOSYMFOLLOW),
        "exec" => off(Attr::MOUNT_ATTR_NOEXEC),
        "nodiratime" => on(Attr::MOUNT_ATTR_NODIRATIME),
        "diratime" => off(Attr::MOUNT_ATTR_NODIRATIME),
        "atime" => off(Attr::MOUNT_ATTR_NOATIME),
        "nostrictatime" => off(Attr::MOUNT_ATTR_STRICTATIME),
        "noatime" => Some((times, Attr::MOUNT_ATTR_NOATIME)),
        "strictatime" => Some((times, Attr::MOUNT_ATTR_STRICTATIME)),
        "relatime" => Some((times, Attr::empty())),
        _ => None,
    }
}

fn is_word(word: &str) -> bool {
    [NO_PASSTHROUGH, OWN_VM].contains(&word) || attribute(word).is_some()
}

/// Of fstab's options, those that mount(8) or systemd has read already.
fn is_for_others(option: &str) -> bool {
    matches!(option, "defaults" | "auto" | "noauto" | "nofail" | "_netdev" | "nouser" | "nousers")
        || matches!(option, "noowner" | "nogroup")
        || ["x-", "X-", "comment="].iter().any(|start| option.starts_with(start))
}

/// What every mount of ours does, what only says how much the kernel logs, and a permission that nobody uses.
fn changes_nothing(option: &str) -> bool {
    matches!(option, "async" | "norelatime" | "silent" | "loud" | "lazytime" | "nolazytime")
}

fn once<T>(name: &'static str, slot: &mut Option<T>, value: T) -> Result<(), OptionsError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(OptionsError::Twice(name)),
    }
}

fn lower_folders(value: &str) -> Result<Vec<PathBuf>, OptionsError> {
    let names = split(value, ':');
    match names.len() {
        1 if names[0].is_empty() => Err(OptionsError::NoLower),
        count if count > MAX_LOWERS => Err(OptionsError::TooMany(count)),
        _ if names.iter().any(|name| name.is_empty()) => Err(OptionsError::EmptyLower),
        _ => Ok(names.into_iter().map(|name| unescape(name).into()).collect()),
    }
}

/// Splits where a separator has no backslash before it; backslashes stay.
fn split(text: &str, separator: char) -> Vec<&str> {
    let mut escaped = false;
    text.split(|char| {
        let splits = char == separator && !escaped;
        escaped = char == '\\' && !escaped;
        splits
    })
    .collect()
}

/// Takes each backslash away that takes a meaning away.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        // One at the very end stands for itself.
        plain.push(if char == '\\' { chars.next().unwrap_or(char) } else { char });
    }
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(text: &str) -> OptionsError {
        Options::parse(text).unwrap_err()
    }

    #[test]
    fn a_usual_list_is_understood() {
        let options = Options::parse("rw,lowerdir=/a:/b,upperdir=/u,workdir=/w,noexec,x-gvfs-hide").unwrap();
        assert_eq!(options.lowers, [PathBuf::from("/a"), "/b".into()]);
        assert_eq!(options.top, Some(("/u".into(), "/w".into())));
        assert_eq!(options.words, ["rw", "noexec"]);
    }

    #[test]
    fn backslashes_protect_colons_commas_and_themselves() {
        let options = Options::parse(r"lowerdir=/a\:b:/c\,d:/e\\,upperdir=/u\:\,,workdir=/w").unwrap();
        assert_eq!(options.lowers, [PathBuf::from("/a:b"), "/c,d".into(), r"/e\".into()]);
        assert_eq!(options.top, Some(("/u:,".into(), "/w".into())));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        assert_eq!(refused("lowerdir=/a,volatile"), OptionsError::Unknown("volatile".into()));
        assert_eq!(refused("upperdir=/u,workdir=/w"), OptionsError::NoLower);
        assert_eq!(refused("lowerdir="), OptionsError::NoLower);
        assert_eq!(refused("lowerdir=/a::/b"), OptionsError::EmptyLower);
        assert_eq!(refused("lowerdir=/a,lowerdir=/b"), OptionsError::Twice("lowerdir"));
        assert_eq!(refused("lowerdir=/a,upperdir=/u"), OptionsError::Half("workdir"));
        assert_eq!(refused("lowerdir=/a,workdir=/u"), OptionsError::Half("upperdir"));
        let many = vec!["/a"; MAX_LOWERS + 1].join(":");
        assert_eq!(refused(&format!("lowerdir={many}")), OptionsError::TooMany(501));
        assert_eq!(Options::parse(&format!("lowerdir={}", &many[3..])).unwrap().lowers.len(), MAX_LOWERS);
    }

    #[test]
    fn what_mount_hands_on_is_understood_or_refused() {
        let text = "rw,suid,dev,exec,auto,nouser,async,nousers,noowner,nogroup,norelatime,silent,loud,lazytime,comment=x";
        let words = Options::parse(&format!("lowerdir=/a,{text}")).unwrap().words;
        assert_eq!(words, ["rw", "suid", "dev", "exec"]);
        for option in ["sync", "dirsync"] {
            assert_eq!(refused(&format!("lowerdir=/a,{option}")), OptionsError::Impossible(option.into()));
        }
        assert_eq!(refused("rw,user_id=0,remount,ro"), OptionsError::Remount);
    }

    #[test]
    fn a_vm_of_its_own_is_asked_for_by_a_word() {
        let words = |text: &str| Options::parse(&format!("lowerdir=/a{text}")).unwrap().words;
        assert!(own_vm(&words(",ro,own_vm")));
        assert!(!own_vm(&words(",ro")));
        assert_eq!(refused("lowerdir=/a,own_vm=1"), OptionsError::Unknown("own_vm=1".into()));
    }

    #[test]
    fn the_last_of_two_contradicting_words_counts() {
        use MountAttrFlags as Attr;
        let of = |words: &str| restrictions(&words.split(',').map(str::to_owned).collect::<Vec<_>>());
        let usual = Attr::MOUNT_ATTR_NOSUID | Attr::MOUNT_ATTR_NODEV;
        assert_eq!(of(""), usual);
        assert_eq!(of("ro,rw"), usual);
        assert_eq!(of("suid,dev,ro"), Attr::MOUNT_ATTR_RDONLY);
        assert_eq!(of("suid,users"), usual | Attr::MOUNT_ATTR_NOEXEC);
        assert_eq!(of("user,exec,nosymfollow"), usual | Attr::MOUNT_ATTR_NOSYMFOLLOW);
        assert_eq!(of("noatime,strictatime"), usual | Attr::MOUNT_ATTR_STRICTATIME);
        assert_eq!(of("suid,dev,user=jo"), usual | Attr::MOUNT_ATTR_NOEXEC);
        assert_eq!(of("suid,dev,owner"), usual);
        assert_eq!(of("suid,group,dev"), Attr::MOUNT_ATTR_NOSUID);
        assert_eq!(of("noatime,nostrictatime"), usual | Attr::MOUNT_ATTR_NOATIME);
        assert_eq!(of("strictatime,atime"), usual | Attr::MOUNT_ATTR_STRICTATIME);
        assert_eq!(of("noatime,atime"), usual);
        assert_eq!(of("strictatime,nostrictatime,nosymfollow,symfollow"), usual);
    }

    proptest! {
        #[test]
        fn any_name_survives_escaping(name in r"[a-z:,=\\]{1,20}") {
            let mut escaped = String::new();
            for char in name.chars() {
                if matches!(char, ':' | ',' | '\\') {
                    escaped.push('\\');
                }
                escaped.push(char);
            }
            let options = Options::parse(&format!("lowerdir={escaped}:/z,ro")).unwrap();
            prop_assert_eq!(options.lowers, vec![PathBuf::from(name), "/z".into()]);
        }
    }
}
