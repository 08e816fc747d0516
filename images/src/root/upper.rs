//! Where a container's changes go, as its annotations say.

use std::collections::HashMap;
use std::path::PathBuf;

/// Where changes of the root file system go: `host` (the default) or `guest`.
pub const UPPER: &str = "io.vmctr.upper";

/// Host folder that takes the changes, so that the container's root folder stays untouched.
pub const UPPER_DIR: &str = "io.vmctr.upper-dir";

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

/// The choice cannot be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpperError {
    /// Neither `host` nor `guest`.
    #[error("Annotation {UPPER}={0:?} is neither \"host\" nor \"guest\"")]
    Upper(String),
    /// No place to put changes.
    #[error("Annotation {UPPER_DIR}={0:?} is not an absolute path of a folder with a name")]
    UpperDir(String),
    /// Both wishes at once.
    #[error("Annotation {UPPER_DIR} wants changes on the host, {UPPER}=guest in the guest: give one of them")]
    Conflict,
}

impl UpperChoice {
    /// Reads the choice from a container's annotations.
    ///
    /// # Errors
    /// Names the annotation that has no meaning.
    pub fn of(annotations: &HashMap<String, String>) -> Result<Self, UpperError> {
        let guest = match annotations.get(UPPER).map(String::as_str) {
            None | Some("host") => false,
            Some("guest") => true,
            Some(other) => return Err(UpperError::Upper(other.to_owned())),
        };
        match annotations.get(UPPER_DIR) {
            Some(_) if guest => Err(UpperError::Conflict),
            Some(dir) => upper_dir(dir).map(Self::HostDir),
            None if guest => Ok(Self::Guest),
            None => Ok(Self::Host),
        }
    }
}

fn upper_dir(text: &str) -> Result<PathBuf, UpperError> {
    let path = PathBuf::from(text);
    if path.is_absolute() && path.file_name().is_some() {
        Ok(path)
    } else {
        Err(UpperError::UpperDir(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(pairs: &[(&str, &str)]) -> Result<UpperChoice, UpperError> {
        let map = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        UpperChoice::of(&map)
    }

    #[test]
    fn known_values_are_read() {
        assert_eq!(choice(&[]), Ok(UpperChoice::Host));
        assert_eq!(choice(&[(UPPER, "host"), ("org.other", "x")]), Ok(UpperChoice::Host));
        assert_eq!(choice(&[(UPPER, "guest")]), Ok(UpperChoice::Guest));
        assert_eq!(choice(&[(UPPER_DIR, "/srv/new")]), Ok(UpperChoice::HostDir("/srv/new".into())));
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        assert_eq!(choice(&[(UPPER, "Guest")]), Err(UpperError::Upper("Guest".into())));
        for bad in ["new", "/", "", "/srv/.."] {
            assert_eq!(choice(&[(UPPER_DIR, bad)]), Err(UpperError::UpperDir(bad.into())), "{bad}");
        }
        assert_eq!(choice(&[(UPPER, "guest"), (UPPER_DIR, "/x")]), Err(UpperError::Conflict));
    }
}
