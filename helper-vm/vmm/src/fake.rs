//! Programs that tests of this crate write and then run.
//!
//! A process of its own writes them: what a test process wrote may still be open for writing in a child that another
//! test's thread has just forked, and the kernel runs no such file ("Text file busy").

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Makes the file an executable shell script.
pub(crate) fn put_script(path: &Path, text: &str) {
    let mut install = Command::new("install");
    let mut child =
        install.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{}", path.display());
}
