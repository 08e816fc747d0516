//! An error on one line, for logs and for reasons that outlive it.

use std::error::Error;

/// The error and its causes: `Cannot start QEMU: cannot find vmctr-jail: ...`.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line = format!("{line}: {cause}");
        next = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::QmpError;
    use crate::vm::VmError;

    #[test]
    fn causes_follow_their_effects() {
        let cause = std::io::Error::other("broken pipe");
        let error = VmError::Qmp(QmpError::Io(cause));
        let line = error_chain(&error);
        assert_eq!(line, "Cannot control QEMU: The connection to QEMU's monitor broke: broken pipe");
    }
}
