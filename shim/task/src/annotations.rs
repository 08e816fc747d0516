//! The annotations `io.vmctr.*` of a container: each known by name, each value checked; an unknown one is
//! refused, because a misspelt wish that is silently dropped looks granted.

use std::collections::HashMap;

use vmctr_images::root::{UPPER, UPPER_DIR, UpperChoice, UpperError};
use vmctr_vmm::spec::{MEMORY_ANNOTATION, START_ANNOTATION, VCPUS_ANNOTATION};

/// Everything that starts so is ours.
const PREFIX: &str = "io.vmctr.";

const KNOWN: [&str; 5] = [MEMORY_ANNOTATION, VCPUS_ANNOTATION, START_ANNOTATION, UPPER, UPPER_DIR];

/// An annotation cannot be honoured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// Misspelt, or of another version.
    #[error("Unknown annotation {0}; known are {known}", known = KNOWN.join(", "))]
    Unknown(String),
    /// No place for changes.
    #[error(transparent)]
    Upper(#[from] UpperError),
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
    Ok(UpperChoice::of(annotations)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(pairs: &[(&str, &str)]) -> Result<UpperChoice, AnnotationError> {
        let map = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        upper_choice(&map)
    }

    #[test]
    fn all_of_ours_are_known_and_others_are_not_ours() {
        let all =
            [(MEMORY_ANNOTATION, "1GiB"), (VCPUS_ANNOTATION, "1"), (UPPER, "guest"), ("org.other", "x")];
        assert_eq!(choice(&all), Ok(UpperChoice::Guest));
    }

    #[test]
    fn a_misspelt_one_is_refused_by_name() {
        let text = choice(&[("io.vmctr.memry", "1GiB")]).unwrap_err().to_string();
        assert!(text.contains("io.vmctr.memry") && text.contains(MEMORY_ANNOTATION), "{text}");
    }
}
