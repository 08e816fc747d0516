//! The annotations `io.vmctr.*` of a container: each known by name, each value checked; an unknown one is
//! refused, because a misspelt wish that is silently dropped looks granted.

use std::collections::HashMap;
use std::path::PathBuf;

use vmctr_vmm::spec::{MEMORY_ANNOTATION, START_ANNOTATION, VCPUS_ANNOTATION};

/// Everything that starts so is ours.
const PREFIX: &str = "io.vmctr.";

/// Where changes of the root file system go: `host` (the default) or `guest`.
const UPPER: &str = "io.vmctr.upper";

/// Host folder that takes the changes, so that the container's root folder stays untouched.
const UPPER_DIR: &str = "io.vmctr.upper-dir";

const KNOWN: [&str; 5] = [MEMORY_ANNOTATION, VCPUS_ANNOTATION, START_ANNOTATION, UPPER, UPPER_DIR];

/// Where changes of the root file system go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum UpperChoice {
    /// Where the snapshot keeps them; a plain folder is changed itself.
    #[default]
    Host,
    /// Into this host folder.
    HostDir(PathBuf),
    /// Into the guest's memory; they end with the VM.
    Guest,
}

/// An annotation cannot be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// Misspelt, or of another version.
    #[error("Unknown annotation {0}; known are {known}", known = KNOWN.join(", "))]
    Unknown(String),
    /// Neither `host` nor `guest`.
    #[error("Annotation {UPPER}={0:?} is neither \"host\" nor \"guest\"")]
    Upper(String),
    /// No place to put changes.
    #[error("Annotation {UPPER_DIR}={0:?} is not an absolute path of a folder with a name")]
    UpperDir(String),
    /// Both wishes at once.
    #[error("Annotation {UPPER_DIR} wants changes on the host, {UPPER}=guest in the guest: give one of them")]
    UpperConflict,
}

/// Checks the names of all annotations of ours and reads the choice of the upper. Memory and CPUs are read
/// by `VmSpec`.
pub fn upper_choice(annotations: &HashMap<String, String>) -> Result<UpperChoice, AnnotationError> {
    let mut unknown: Vec<_> =
        annotations.keys().filter(|key| key.starts_with(PREFIX) && !KNOWN.contains(&key.as_str())).collect();
    unknown.sort();
    if let Some(key) = unknown.first() {
        return Err(AnnotationError::Unknown((*key).clone()));
    }
    let guest = match annotations.get(UPPER).map(String::as_str) {
        None | Some("host") => false,
        Some("guest") => true,
        Some(other) => return Err(AnnotationError::Upper(other.to_owned())),
    };
    match annotations.get(UPPER_DIR) {
        Some(_) if guest => Err(AnnotationError::UpperConflict),
        Some(dir) => upper_dir(dir).map(UpperChoice::HostDir),
        None if guest => Ok(UpperChoice::Guest),
        None => Ok(UpperChoice::Host),
    }
}

fn upper_dir(text: &str) -> Result<PathBuf, AnnotationError> {
    let path = PathBuf::from(text);
    if path.is_absolute() && path.file_name().is_some() {
        Ok(path)
    } else {
        Err(AnnotationError::UpperDir(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(pairs: &[(&str, &str)]) -> Result<UpperChoice, AnnotationError> {
        let map = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        upper_choice(&map)
    }

    #[test]
    fn known_values_are_read() {
        assert_eq!(choice(&[]), Ok(UpperChoice::Host));
        assert_eq!(choice(&[(UPPER, "host"), ("org.other", "x")]), Ok(UpperChoice::Host));
        assert_eq!(choice(&[(UPPER, "guest"), (MEMORY_ANNOTATION, "1GiB")]), Ok(UpperChoice::Guest));
        assert_eq!(choice(&[(UPPER_DIR, "/srv/new")]), Ok(UpperChoice::HostDir("/srv/new".into())));
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let text = choice(&[("io.vmctr.memry", "1GiB")]).unwrap_err().to_string();
        assert!(text.contains("io.vmctr.memry") && text.contains(MEMORY_ANNOTATION), "{text}");
        assert_eq!(choice(&[(UPPER, "Guest")]), Err(AnnotationError::Upper("Guest".into())));
        for bad in ["new", "/", "", "/srv/.."] {
            assert_eq!(choice(&[(UPPER_DIR, bad)]), Err(AnnotationError::UpperDir(bad.into())), "{bad}");
        }
        assert_eq!(choice(&[(UPPER, "guest"), (UPPER_DIR, "/x")]), Err(AnnotationError::UpperConflict));
    }
}
