//! Module trees made by hand: a module is an ELF file that has a `.modinfo` section and nothing else.

use super::*;
use crate::decompress::testing::pack;

const RELEASE: &str = "6.12.0-test";

/// An ELF file whose only named section is `.modinfo`.
fn elf_module(release: &str, depends: &str) -> Vec<u8> {
    let modinfo = format!("license=GPL\0depends={depends}\0vermagic={release} SMP mod_unload \0");
    let names = b"\0.modinfo\0.shstrtab\0";
    let header_size = 64;
    let names_at = header_size + modinfo.len();
    let sections_at = (names_at + names.len()).next_multiple_of(8);

    let mut elf = vec![0u8; header_size];
    elf[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    elf[16..20].copy_from_slice(&[1, 0, 62, 0]); // ET_REL, EM_X86_64
    elf[20] = 1;
    elf[40..48].copy_from_slice(&(sections_at as u64).to_le_bytes()); // e_shoff
    elf[52] = 64; // e_ehsize
    elf[58] = 64; // e_shentsize
    elf[60] = 3; // e_shnum
    elf[62] = 2; // e_shstrndx
    elf.extend(modinfo.as_bytes());
    elf.extend(names);
    elf.resize(sections_at, 0);
    elf.extend([0; 64]);
    elf.extend(section(1, 1, header_size, modinfo.len()));
    elf.extend(section(10, 3, names_at, names.len()));
    elf
}

fn section(name: u32, kind: u32, offset: usize, size: usize) -> [u8; 64] {
    let mut header = [0; 64];
    header[..4].copy_from_slice(&name.to_le_bytes());
    header[4..8].copy_from_slice(&kind.to_le_bytes());
    header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
    header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
    header
}

/// A module directory with these built-in modules and these module files.
fn tree(builtin: &[&str], modules: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let list: String = builtin.iter().map(|path| format!("kernel/{path}.ko\n")).collect();
    std::fs::write(dir.path().join("modules.builtin"), list).unwrap();
    for (path, image) in modules {
        let path = dir.path().join("kernel").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, image).unwrap();
    }
    dir
}

fn module(depends: &str) -> Vec<u8> {
    elf_module(RELEASE, depends)
}

fn names(dir: &Path) -> Vec<String> {
    collect(dir, RELEASE).unwrap().into_iter().map(|module| module.name).collect()
}

const ALL_BUILTIN: [&str; 4] = [
    "drivers/virtio/virtio_pci",
    "fs/fuse/virtiofs",
    "fs/overlayfs/overlay",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
];

#[test]
fn dependencies_come_first_and_once_and_built_in_ones_not_at_all() {
    let dir = tree(
        &["drivers/virtio/virtio_pci", "fs/fuse/fuse"],
        &[
            ("fs/overlay.ko", module("")),
            ("fs/virtiofs.ko", module("fuse")),
            ("net/vmw_vsock_virtio_transport.ko", module("vmw_vsock_virtio_transport_common,vsock")),
            ("net/vmw_vsock_virtio_transport_common.ko", module("vsock")),
            ("net/vsock.ko", module("")),
            ("net/unrelated.ko", module("")),
        ],
    );
    let expected =
        ["virtiofs", "overlay", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"];
    assert_eq!(names(dir.path()), expected);
}

#[test]
fn every_compression_is_unpacked_and_names_are_the_kernels() {
    for (ending, format) in
        [("", None), (".gz", Some(Format::Gzip)), (".xz", Some(Format::Xz)), (".zst", Some(Format::Zstd))]
    {
        let plain = module("");
        let packed = format.map_or_else(|| plain.clone(), |format| pack(format, &plain));
        let dir = tree(&ALL_BUILTIN[1..], &[(&format!("virtio/virtio-pci.ko{ending}"), packed)]);
        let expected = [Module { name: "virtio_pci".to_owned(), image: plain, trusts_names: false }];
        assert_eq!(collect(dir.path(), RELEASE).unwrap(), expected);
    }
}

#[test]
fn a_kernel_with_everything_built_in_needs_no_module() {
    let dir = tree(&ALL_BUILTIN, &[("other.ko", module(""))]);
    assert!(names(dir.path()).is_empty());
}

fn refusal(modules: &[(&str, Vec<u8>)]) -> ModuleError {
    let dir = tree(&ALL_BUILTIN[1..], modules);
    collect(dir.path(), RELEASE).unwrap_err()
}

#[test]
fn a_kernel_without_a_needed_module_is_refused_by_name() {
    let error = refusal(&[("other.ko", module(""))]);
    assert!(error.to_string().starts_with("The kernel has no virtio_pci:"), "{error}");
}

#[test]
fn modules_of_another_kernel_are_refused() {
    let error = refusal(&[("virtio_pci.ko", elf_module("6.1.0", ""))]);
    assert!(error.to_string().ends_with(r#"is for kernel "6.1.0", not for 6.12.0-test"#), "{error}");
}

#[test]
fn a_cycle_is_refused() {
    let error =
        refusal(&[("virtio_pci.ko", module("virtio-ring")), ("virtio_ring.ko", module("virtio_pci"))]);
    assert!(matches!(error, ModuleError::Cycle(name) if name == "virtio_pci"));
}

#[test]
fn damaged_modules_are_refused() {
    let packed = pack(Format::Xz, &module(""));
    let cut = packed[..packed.len() / 2].to_vec();
    assert!(matches!(refusal(&[("virtio_pci.ko.xz", cut)]), ModuleError::Unpack { .. }));
    assert!(matches!(refusal(&[("virtio_pci.ko", b"text".to_vec())]), ModuleError::NoModule { .. }));
}

#[test]
fn a_directory_that_is_none_of_modules_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = collect(dir.path(), RELEASE).unwrap_err();
    assert!(error.to_string().contains("modules.builtin cannot be read"), "{error}");
}

#[test]
fn file_names_that_are_no_modules_have_no_module_name() {
    for name in ["overlay.ko.bak", "overlay.c", "modules.dep", "overlay"] {
        assert_eq!(module_name(Path::new(name)), None, "{name}");
    }
}
