//! Images made on the fly: a busybox root as a folder or as an OCI archive.
//!
//! ```text
//!   archive: oci-layout  index.json ──> blobs/sha256/<manifest> ──> <config>, <layer: uncompressed tar>
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::fs::{lgetxattr, llistxattr};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{command, prerequisites};

/// Name under which the busybox image is imported.
pub const BUSYBOX: &str = "docker.io/vmctr/busybox:test";

/// A file read from the image by tests, and what it says.
pub const MARKER: (&str, &str) = ("etc/marker", "from the image");

/// User in the image: name and number.
pub const USER: (&str, u32) = ("alice", 1000);

/// A root file system that holds busybox and these further executables (path in the image, host file).
pub fn write_root(root: &Path, extra: &[(&str, &Path)]) {
    for folder in ["bin", "dev", "etc", "home/alice", "proc", "root", "sys", "tmp", "var/tmp"] {
        fs::create_dir_all(root.join(folder)).expect("the folder is writable");
    }
    for folder in ["tmp", "var/tmp"] {
        set_mode(&root.join(folder), 0o1777);
    }
    install(&prerequisites::program("busybox"), &root.join("bin/busybox"));
    for applet in applets() {
        symlink("busybox", root.join("bin").join(applet)).expect("each applet is listed once");
    }
    for (path, file) in extra {
        install(file, &root.join(path));
    }
    write_texts(root);
}

fn write_texts(root: &Path) {
    let (name, uid) = USER;
    let texts = [
        (
            "etc/passwd",
            format!("root:x:0:0:root:/root:/bin/sh\n{name}:x:{uid}:{uid}::/home/{name}:/bin/sh\n"),
        ),
        ("etc/group", format!("root:x:0:\n{name}:x:{uid}:\nextra:x:2000:{name}\n")),
        (MARKER.0, format!("{}\n", MARKER.1)),
    ];
    for (path, text) in texts {
        fs::write(root.join(path), text).expect("the folder is writable");
    }
}

fn applets() -> Vec<String> {
    let list = command::run(std::process::Command::new(prerequisites::program("busybox")).arg("--list")).ok();
    list.text().lines().filter(|applet| *applet != "busybox").map(str::to_owned).collect()
}

fn install(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap_or_else(|e| panic!("cannot copy {}: {e}", from.display()));
    set_mode(to, 0o755);
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("the file is ours");
}

/// Packs a root file system as an OCI archive with one layer.
pub fn write_archive(root: &Path, name: &str, archive: &Path) {
    let layer = layer(root);
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
    });
    let config = config.to_string().into_bytes();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    });
    let manifest = manifest.to_string().into_bytes();
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["annotations"] = json!({"io.containerd.image.name": name});
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string().into_bytes();

    let mut tar = tar::Builder::new(File::create(archive).expect("the folder is writable"));
    add(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    add(&mut tar, "index.json", &index);
    for blob in [&manifest, &config, &layer] {
        add(&mut tar, &format!("blobs/sha256/{}", &digest(blob)["sha256:".len()..]), blob);
    }
    tar.finish().expect("the archive is writable");
}

fn layer(root: &Path) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    tar.append_dir_all(".", root).expect("the root can be read");
    tar.into_inner().expect("memory does not fail")
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

/// A blob's digest as OCI writes it.
pub fn digest(blob: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(blob)))
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn add(tar: &mut tar::Builder<impl Write>, path: &str, bytes: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, path, bytes).expect("the archive is writable");
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Digest of everything in a folder, as [`tree_lines`] tells it.
pub fn tree_digest(root: &Path) -> String {
    digest(tree_lines(root).concat().as_bytes())
}

/// Everything in a folder, a line each: names, kinds, modes, owners, times, hard links, attributes and contents.
pub fn tree_lines(root: &Path) -> Vec<String> {
    let mut firsts = HashMap::new();
    sorted_tree(root).iter().map(|path| describe(root, path, &mut firsts)).collect()
}

fn sorted_tree(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    if folder.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
        let mut entries: Vec<_> =
            fs::read_dir(folder).expect("readable").flatten().map(|e| e.path()).collect();
        entries.sort();
        found.extend(entries.iter().flat_map(|entry| sorted_tree(entry)));
    }
    found
}

fn describe(root: &Path, path: &Path, firsts: &mut HashMap<(u64, u64), PathBuf>) -> String {
    use std::os::unix::fs::MetadataExt;
    let meta = path.symlink_metadata().expect("it was just listed");
    let content = match () {
        () if meta.is_file() => digest(&fs::read(path).expect("readable")),
        () if meta.is_symlink() => format!("-> {:?}", fs::read_link(path).expect("a link")),
        () => String::new(),
    };
    let name = path.strip_prefix(root).expect("beneath the root");
    // An overlay counts links that it does not show: only names that are seen together are linked.
    let first = firsts.entry((meta.dev(), meta.ino())).or_insert_with(|| name.to_owned());
    let linked = (!meta.is_dir() && first != name).then(|| first.clone());
    let (mode, owner, time) = (meta.mode(), (meta.uid(), meta.gid()), (meta.mtime(), meta.mtime_nsec()));
    let attributes = attributes(path);
    format!("{name:?} {mode:o} {owner:?} {time:?} {:?} {linked:?} {attributes:?} {content}\n", meta.rdev())
}

/// The names of an inode's extended attributes, and their values in hexadecimal.
fn attributes(path: &Path) -> BTreeMap<String, String> {
    const LONGEST: usize = 64 * 1024;
    let mut names = Vec::with_capacity(LONGEST);
    // A file system without attributes has none.
    if llistxattr(path, spare_capacity(&mut names)).is_err() {
        return BTreeMap::new();
    }
    let value = |name: &[u8]| {
        let mut value = Vec::with_capacity(LONGEST);
        lgetxattr(path, name, spare_capacity(&mut value)).expect("it was just listed");
        (String::from_utf8_lossy(name).into_owned(), hex(&value))
    };
    names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_digest_sees_content_mode_names_and_hard_links() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "a").unwrap();
        let before = tree_digest(folder.path());
        assert_eq!(before, tree_digest(folder.path()));
        set_mode(&file, 0o600);
        let chmod = tree_digest(folder.path());
        assert_ne!(before, chmod);
        symlink("f", folder.path().join("l")).unwrap();
        let linked = tree_digest(folder.path());
        assert_ne!(chmod, linked);
        fs::hard_link(&file, folder.path().join("z")).unwrap();
        let hard = tree_lines(folder.path());
        assert!(hard[3].contains("Some(\"f\")"), "{hard:?}");
    }

    #[test]
    fn an_archive_holds_the_blobs_that_its_index_names() {
        let folder = tempfile::tempdir().unwrap();
        let (root, archive) = (folder.path().join("r"), folder.path().join("a.tar"));
        fs::create_dir(&root).unwrap();
        fs::write(root.join("f"), "x").unwrap();
        write_archive(&root, "n", &archive);
        let mut tar = tar::Archive::new(File::open(&archive).unwrap());
        let names: Vec<_> =
            tar.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
        assert_eq!(names[..2], ["oci-layout", "index.json"]);
        assert_eq!(names.len(), 5);
    }
}
