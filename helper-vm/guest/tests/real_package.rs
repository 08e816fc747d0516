//! Guest assets from the distribution's own kernel package, the one that `make build` uses.

#![allow(clippy::unwrap_used)] // In a test, a step that fails is a failed test.

use std::path::{Path, PathBuf};
use std::process::Command;

use vmctr_guest::{BuildError, BuildRequest, KernelSource, build, inspect};
use vmctr_proto::manifest::GuestManifest;

fn kernel_package() -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/fetch-kernel");
    let output = Command::new(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Any static executable will do as agent; this test is one.
fn build_from(kernel: KernelSource, out: &Path) -> Result<GuestManifest, BuildError> {
    build(&BuildRequest { kernel, agent: std::env::current_exe().unwrap(), out: out.to_owned() })
}

#[test]
fn the_distributions_kernel_becomes_bootable_assets_and_twice_the_same() {
    let deb = kernel_package();
    let dir = tempfile::tempdir().unwrap();
    let manifest = build_from(KernelSource::Deb(deb.clone()), dir.path()).unwrap();

    assert!(manifest.kernel_source.contains(&manifest.kernel_release), "{manifest:?}");
    assert!(manifest.modules.contains(&"overlay".to_owned()), "{manifest:?}");
    assert!(manifest.hard_links, "the kernel's overlay is not the one that is known");
    let last = ["vmw_vsock_virtio_transport", "virtio_balloon"].map(str::to_owned);
    assert!(manifest.modules.ends_with(&last), "{manifest:?}");
    let kernel = std::fs::read(dir.path().join(&manifest.kernel.file)).unwrap();
    assert_eq!(&kernel[..4], b"\x7fELF", "the payload is entered directly");

    assert_eq!(inspect(dir.path()).unwrap(), manifest);
    assert_eq!(build_from(KernelSource::Deb(deb), dir.path()).unwrap(), manifest);
}

#[test]
fn a_kernel_file_that_is_no_kernel_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("guest");
    let kernel = KernelSource::Files { vmlinuz: "/etc/os-release".into(), modules: dir.path().to_owned() };
    let error = build_from(kernel, &out).unwrap_err();
    assert_eq!(error.to_string(), "/etc/os-release is not a usable kernel");
    assert!(!out.exists());
}
