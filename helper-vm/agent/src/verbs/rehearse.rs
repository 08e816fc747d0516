//! Rehearse: one container from create to delete, with a root of its own, before there is a share.
//!
//! A VM that waits to be taken, or is to become a template, has time. What it runs now is in memory, and in the
//! pool under an emulated CPU translated too, when the container comes that somebody waits for; and so is what it
//! makes ahead for that container.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use vmctr_proto::agent::{CreateContainerRequest, GuestUpper, Overlay, ProcessRef, Root, overlay, root};
use vmctr_proto::guest_paths::SHARE_DIR;

use super::{Error, Result, blocking, create, delete, io_error, start};
use crate::cgroup::Cgroup;
use crate::guest::Handle;
use crate::network::Network;

/// As containers' specs are: the same namespaces, mounts and restrictions.
const SPEC: &str = include_str!("rehearse.json");

const CONTAINER: &str = "rehearsal";

/// The only layer, where layers of a share would be.
const LAYER: &str = "lower/0";

/// `exit(0)` as an ELF file: header, one loaded segment (the file itself at 0x400000), nine bytes of code.
const PROGRAM: [u8; 129] = [
    0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // 64 bits, little-endian
    2, 0, 62, 0, 1, 0, 0, 0, 0x78, 0, 0x40, 0, 0, 0, 0, 0, // executable, x86-64, entry 0x400078
    64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // program header at 64
    0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0, // one of 56 bytes
    1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // PT_LOAD, readable and executable
    0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, // at 0x400000
    129, 0, 0, 0, 0, 0, 0, 0, 129, 0, 0, 0, 0, 0, 0, 0, // 129 bytes
    0, 0x10, 0, 0, 0, 0, 0, 0, // aligned to a page
    0xb8, 60, 0, 0, 0, // mov eax, 60 (exit)
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
];

/// Runs the container and removes every trace of it, then makes ahead what the next one will need.
pub async fn rehearse(guest: Handle) -> Result<()> {
    if guest.call(|guest| guest.share.is_some()).await {
        let why = "there is a share already";
        return Err(Error::Busy { what: "a container".to_owned(), verb: "rehearsed", why });
    }
    blocking(build_layer).await?;
    create(guest.clone(), request()).await?;
    let init = ProcessRef { container_id: CONTAINER.to_owned(), exec_id: String::new() };
    let started = start(guest.clone(), init.clone()).await;
    delete(guest.clone(), init).await?;
    started?;
    blocking(remove_layer).await?;
    make_ahead(&guest).await
}

/// What a container needs and no other may have had: its control group and its network.
async fn make_ahead(guest: &Handle) -> Result<()> {
    let network = blocking(|| Network::make().map_err(io_error("a network namespace"))).await?;
    let name = guest
        .call(|guest| {
            guest.network = Some(network);
            guest.next_name()
        })
        .await;
    Ok(Cgroup::of(&name).create()?)
}

fn request() -> CreateContainerRequest {
    let upper = overlay::Upper::Guest(GuestUpper { size_bytes: 0 });
    let overlay = Overlay { lowers: vec![LAYER.to_owned()], upper: Some(upper) };
    CreateContainerRequest {
        container_id: CONTAINER.to_owned(),
        spec: SPEC.into(),
        root: Some(Root { kind: Some(root::Kind::Overlay(overlay)) }),
        stdio: None,
    }
}

fn layer() -> PathBuf {
    Path::new(SHARE_DIR).join(LAYER)
}

fn build_layer() -> Result<()> {
    let program = layer().join("program");
    let build = || {
        fs::create_dir_all(layer())?;
        fs::write(&program, PROGRAM)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
    };
    build().map_err(io_error(program.display().to_string()))
}

/// The share will be mounted on an empty folder.
fn remove_layer() -> Result<()> {
    let path = Path::new(SHARE_DIR).join("lower");
    fs::remove_dir_all(&path).map_err(io_error(path.display().to_string()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// By a process of its own: a program that this one wrote may still be open for writing in a child that another
    /// test has just forked, and cannot be run then.
    fn put_program(path: &Path) {
        let mut install = Command::new("install");
        let mut child =
            install.args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&PROGRAM).unwrap();
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn the_program_exits_with_zero() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        put_program(&path);
        assert_eq!(Command::new(&path).status().unwrap().code(), Some(0));
    }

    #[test]
    fn the_spec_is_one() {
        let spec: libcontainer::oci_spec::runtime::Spec = serde_json::from_str(SPEC).unwrap();
        let args = spec.process().as_ref().and_then(|process| process.args().clone());
        assert_eq!(args, Some(vec!["/program".to_owned()]));
        assert!(
            spec.linux()
                .as_ref()
                .and_then(|linux| linux.namespaces().as_ref())
                .is_some_and(|all| all.len() > 4)
        );
    }
}
