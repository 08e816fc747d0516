//! A program for a container: gives files extended attributes, which busybox cannot.
//!
//! ```text
//!   set-xattr PATH NAME VALUE      any attribute, with this text
//!   set-xattr PATH capability N    the file capability with this number, 0 to 31
//!   set-xattr PATH remove NAME     takes an attribute away
//! ```

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use rustix::fs::{XattrFlags, lremovexattr, lsetxattr};
use rustix::io::Errno;

fn main() -> ExitCode {
    // A container's names need be no text.
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [path, name, value] = args.as_slice() else {
        eprintln!("usage: set-xattr PATH NAME VALUE | PATH capability NUMBER | PATH remove NAME");
        return ExitCode::from(2);
    };
    let done = match name.as_bytes() {
        b"remove" => lremovexattr(path, value),
        b"capability" => set_capability(path, value),
        _ => lsetxattr(path, name, value.as_bytes(), XattrFlags::empty()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(errno) => {
            eprintln!("set-xattr: {}: {errno}", path.display());
            ExitCode::FAILURE
        }
    }
}

/// As the kernel keeps it: revision 2, effective; permitted and inheritable, low words before high ones.
fn set_capability(path: &OsStr, number: &OsStr) -> Result<(), Errno> {
    const REVISION_2_EFFECTIVE: u32 = 0x0200_0001;
    let number = number.to_str().and_then(|number| number.parse::<u32>().ok());
    let number = number.filter(|number| *number < 32).ok_or(Errno::INVAL)?;
    let words = [REVISION_2_EFFECTIVE, 1 << number, 0, 0, 0];
    let value: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    lsetxattr(path, "security.capability", &value, XattrFlags::empty())
}
