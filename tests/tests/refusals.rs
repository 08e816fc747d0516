//! What cannot be run is refused at create, with a message that names the thing; nothing is left.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use vmctr_tests::rig::{Rig, image, prerequisites};

#[test]
fn a_missing_root_folder_is_named() {
    let rig = Rig::vmctr();
    rig.container_in(Path::new("/no/such/folder"), "a")
        .sh("true")
        .output()
        .fails_naming(&["/no/such/folder"]);
    let file = rig.folder().join("file");
    fs::write(&file, "").expect("writable");
    rig.container_in(&file, "b").sh("true").output().fails_naming(&["/file"]);
}

#[test]
fn a_missing_mount_source_is_named() {
    let rig = Rig::vmctr();
    let run = rig.container("a").bind(Path::new("/no/such/source"), "/data", "rbind:ro");
    run.sh("true").output().fails_naming(&["/no/such/source", "/data"]);
}

#[test]
fn annotations_are_checked_by_name_and_value() {
    let rig = Rig::vmctr();
    let refuse = |name: &str, key: &str, value: &str| {
        rig.container(name).annotation(key, value).sh("true").output().fails_naming(&[key])
    };
    refuse("a", "io.vmctr.memry", "512MiB");
    refuse("b", "io.vmctr.memory", "lots").fails_naming(&["lots", "MiB"]);
    refuse("c", "io.vmctr.memory", "16MiB").fails_naming(&["128"]);
    refuse("d", "io.vmctr.memory", "900000GiB");
    refuse("e", "io.vmctr.vcpus", "0");
    refuse("f", "io.vmctr.upper", "moon").fails_naming(&["moon", "guest"]);
    refuse("g", "io.vmctr.upper-dir", "relative/folder");
    refuse("h", "io.vmctr.upper-dir", "/no/such/folder/upper");
}

#[test]
fn what_belongs_to_the_host_cannot_be_had_in_a_vm() {
    let rig = Rig::vmctr();
    rig.container("net").switch("--net-host").sh("true").output().fails_naming(&["network", "VM"]);
    let run = rig.container("pid").flag("--with-ns", "pid:/proc/1/ns/pid");
    run.sh("true").output().fails_naming(&["pid", "VM"]);
    rig.container("dev").flag("--device", "/dev/fuse").sh("true").output().fails_naming(&["/dev/fuse", "VM"]);
    let map = "0:100000:65536";
    let run = rig.container("user").flag("--uidmap", map).flag("--gidmap", map);
    run.sh("true").output().fails_naming(&["user"]);
}

#[test]
fn a_configuration_error_names_file_line_and_key() {
    let rig = Rig::vmctr_with("[vm]\nmemroy = \"1GiB\"\n");
    rig.container("a").sh("true").output().fails_naming(&["vmctr.toml:4", "memroy"]);
    let rig = Rig::vmctr_with("[vm]\nmemory = \"some\"\n");
    rig.container("b").sh("true").output().fails_naming(&["vmctr.toml:4", "some"]);
}

#[test]
fn a_missing_qemu_is_named() {
    let rig = Rig::vmctr_with("qemu = \"/no/such/qemu\"\n");
    rig.container("a").sh("true").output().fails_naming(&["/no/such/qemu"]);
}

#[test]
fn a_missing_guest_is_named() {
    let rig = Rig::vmctr_booting("", Path::new("/no/such/guest"));
    rig.container("a").sh("true").output().fails_naming(&["/no/such/guest", "vmctr guest build"]);
}

/// A copy of the guest with another kernel; its manifest describes that file.
fn guest_with_kernel(folder: &Path, kernel: &[u8]) -> PathBuf {
    let (from, to) = (prerequisites::guest_dir(), folder.join("guest"));
    fs::create_dir(&to).expect("writable");
    let text = fs::read_to_string(from.join("manifest.json")).expect("readable");
    let mut manifest: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let initramfs = manifest["initramfs"]["file"].as_str().expect("a name");
    fs::copy(from.join(initramfs), to.join(initramfs)).expect("readable");
    fs::write(to.join(manifest["kernel"]["file"].as_str().expect("a name")), kernel).expect("writable");
    manifest["kernel"]["size"] = kernel.len().into();
    manifest["kernel"]["sha256"] = image::hex(&Sha256::digest(kernel)).into();
    fs::write(to.join("manifest.json"), manifest.to_string()).expect("writable");
    to
}

#[test]
fn a_kernel_file_that_is_no_kernel_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let guest = guest_with_kernel(folder.path(), b"#!/bin/sh\necho I am no kernel\n");
    let rig = Rig::vmctr_booting("", &guest);
    rig.container("a").sh("true").output().fails_naming(&["vmlinux", "no kernel"]);
}

#[test]
fn a_kernel_that_does_not_boot_is_given_up() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut kernel = fs::read(prerequisites::guest_dir().join("vmlinux")).expect("readable");
    // All code and data after the headers: QEMU loads it, the CPU finds nonsense.
    let end = kernel.len().min(32 << 20);
    kernel[8192..end].fill(0xcc);
    let guest = guest_with_kernel(folder.path(), &kernel);
    let rig = Rig::vmctr_booting("[vm]\nboot_timeout_seconds = 8\naccelerator = \"tcg\"\n", &guest);
    let output = rig.container("a").sh("true").output().fails_naming(&["VM"]);
    assert!(output.took.as_secs() < 30, "{output}");
}
