//! What mount(8) calls for a union: `mount.fuse.vmctr SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS] [-t TYPE]`.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::anyhow;

use crate::cli::UnionMount;
use crate::failure::Failure;

const ELSEWHERE: &str =
    "Option -N is not possible: run mount(8) in that namespace, as `nsenter --mount=FILE mount` does";

fn usage(text: impl Into<String>) -> Failure {
    Failure::usage(anyhow!(text.into()))
}

/// The arguments as mount(8) gives them; `None` when it wants nothing done (`-f`).
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Option<UnionMount>, Failure> {
    let (mut places, mut options, mut fake) = (Vec::new(), Vec::new(), false);
    let mut args =
        args.map(|arg| arg.into_string().map_err(|arg| usage(format!("{} is not UTF-8", arg.display()))));
    while let Some(arg) = args.next().transpose()? {
        let mut value = || args.next().unwrap_or_else(|| Err(usage(format!("{arg} lacks its value"))));
        match arg.as_str() {
            "-N" => return Err(usage(ELSEWHERE)),
            "-o" => options.push(value()?),
            "-t" => drop(value()?),
            "-f" => fake = true,
            "-n" | "-s" | "-v" => {}
            _ if arg.starts_with('-') => return Err(usage(format!("Option {arg} is not known"))),
            _ => places.push(arg),
        }
    }
    let [_, mountpoint] = places.as_slice() else {
        return Err(usage("usage: mount.fuse.vmctr vmctr MOUNTPOINT -o lowerdir=A[:B...],..."));
    };
    Ok((!fake).then(|| UnionMount { options, own_vm: false, mountpoint: PathBuf::from(mountpoint) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    fn parsed(args: &[&str]) -> Result<Option<UnionMount>, Failure> {
        parse(args.iter().map(OsString::from))
    }

    #[test]
    fn mounts_arguments_are_understood() {
        let args = ["vmctr", "/mnt", "-s", "-o", "rw,lowerdir=/a", "-t", "fuse.vmctr"];
        let args = parsed(&args).unwrap().unwrap();
        assert_eq!((args.options, args.mountpoint), (vec!["rw,lowerdir=/a".into()], "/mnt".into()));
        assert!(parsed(&["vmctr", "/mnt", "-f"]).unwrap().is_none());
    }

    #[test]
    fn others_are_wrong_usage() {
        for args in [
            &["vmctr"][..],
            &["vmctr", "/mnt", "-o"],
            &["vmctr", "/mnt", "-x"],
            &["vmctr", "/mnt", "-N", "1"],
        ] {
            assert_eq!(parsed(args).unwrap_err().exit(), Exit::Usage, "{args:?}");
        }
    }
}
