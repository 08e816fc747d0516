//! What the tests need from outside. A missing thing is a failed test, never a skipped one.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::command;

/// Folder with the release binaries: `VMCTR_BIN_DIR`, else `target/release` of this tree.
pub fn bin_dir() -> PathBuf {
    folder("VMCTR_BIN_DIR", "target/release", "containerd-shim-vmctr-v2", "make build")
}

/// Folder with the guest assets: `VMCTR_GUEST_DIR`, else `target/guest` of this tree.
pub fn guest_dir() -> PathBuf {
    folder("VMCTR_GUEST_DIR", "target/guest", "manifest.json", "make build")
}

/// Archive with a real distribution's image: `VMCTR_TEST_IMAGE`, else `target/images/debian.tar` of this tree.
pub fn debian_image() -> PathBuf {
    let default = || workspace().join("target/images/debian.tar");
    let path = env::var_os("VMCTR_TEST_IMAGE").map_or_else(default, PathBuf::from);
    assert!(path.is_file(), "no image archive; `scripts/demo-image {}` builds it", path.display());
    path
}

/// The kernel package that guests are built from.
pub fn kernel_package() -> PathBuf {
    let output = command::run(&mut Command::new(workspace().join("scripts/fetch-kernel"))).ok();
    PathBuf::from(output.text().trim())
}

/// Folder of the templates that the tests share.
pub fn template_dir() -> PathBuf {
    workspace().join("target/templates")
}

/// One of the project's binaries.
pub fn binary(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(path.is_file(), "no binary {}; `make build` builds it", path.display());
    path
}

/// A test suite of others.
pub fn tool(name: &str) -> PathBuf {
    let path = workspace().join("target/tools/bin").join(name);
    assert!(path.is_file(), "no {}; `scripts/test-tools` builds it", path.display());
    path
}

/// A program of the host.
pub fn program(name: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(sbin)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed; `make setup` installs what the tests need"))
}

/// Where cgroup v2 is mounted.
pub fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    cgroup2_in(&mounts).expect("cgroup v2 is mounted: the rig finds a test's processes by their cgroup")
}

/// Everything here needs root.
pub fn root() {
    assert!(nix::unistd::geteuid().is_root(), "the end-to-end tests need root");
}

fn cgroup2_in(mountinfo: &str) -> Option<PathBuf> {
    let line = mountinfo.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

fn folder(variable: &str, default: &str, must_hold: &str, command: &str) -> PathBuf {
    let path = env::var_os(variable).map_or_else(|| workspace().join(default), PathBuf::from);
    assert!(
        path.join(must_hold).is_file(),
        "no {must_hold} in {} ({variable}); `{command}` makes it",
        path.display()
    );
    path
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_among_other_mounts() {
        let mounts = "1 0 0:1 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      2 1 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      3 1 0:3 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_in(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_in("1 0 0:1 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }
}
