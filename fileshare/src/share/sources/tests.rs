//! What may be shared, and what is refused.

use super::*;
use crate::share::Volume;

fn overlay(upper: &Path, work: &Path) -> ShareSpec {
    let top = Top::Overlay { upper: upper.to_owned(), work: work.to_owned() };
    ShareSpec { top, ..ShareSpec::new() }
}

fn volume(source: &Path) -> ShareSpec {
    let volume = Volume { source: source.to_owned(), read_only: false, recursive: false };
    ShareSpec { volumes: vec![volume], ..ShareSpec::new() }
}

#[test]
fn the_common_parent_is_the_deepest() {
    let parent = |a: &str, b: &str| common_parent(Path::new(a), Path::new(b));
    assert_eq!(parent("/a/b/fs", "/a/b/work"), Path::new("/a/b"));
    assert_eq!(parent("/a/b/c/fs", "/a/work"), Path::new("/a"));
    assert_eq!(parent("/a/bc", "/a/b"), Path::new("/a"));
    assert_eq!(parent("/a", "/b"), Path::new("/"));
}

#[test]
fn a_missing_layer_is_named_with_its_cause() {
    let spec = ShareSpec { lowers: vec!["/no/such/layer".into()], ..ShareSpec::new() };
    let error = Sources::open(&spec).unwrap_err();
    assert_eq!(error.to_string(), "cannot open lower layer /no/such/layer");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("No such file"));
}

#[test]
fn a_file_is_no_layer() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let spec = ShareSpec { lowers: vec![file.path().into()], ..ShareSpec::new() };
    assert!(matches!(Sources::open(&spec), Err(SourceError::Type { found: "file", .. })));
}

#[test]
fn special_files_are_refused_unopened() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // A fifo without a writer would block an open for reading.
    assert!(matches!(Sources::open(&volume(&fifo)), Err(SourceError::Type { found: "fifo", .. })));
    let device = Path::new("/dev/null");
    assert!(matches!(Sources::open(&volume(device)), Err(SourceError::Type { found: "device", .. })));
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(matches!(Sources::open(&volume(&socket)), Err(SourceError::Type { found: "socket", .. })));
}

#[test]
fn links_are_followed_for_containers_only() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    for name in ["real/low", "real/up", "real/work"] {
        std::fs::create_dir_all(dir.join(name)).unwrap();
    }
    std::os::unix::fs::symlink("real", dir.join("link")).unwrap();
    let at = |name: &str| dir.join(name);
    let lower = |name| ShareSpec { lowers: vec![at(name)], ..ShareSpec::new() };
    for spec in [lower("link/low"), lower("link"), overlay(&at("link/up"), &at("real/work"))] {
        Sources::open(&spec).unwrap();
        let error = Sources::open(&ShareSpec { used_by: UsedBy::Union, ..spec }).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("symbolic link"), "{error}: {cause}");
    }
    let union = ShareSpec { used_by: UsedBy::Union, ..overlay(&at("real/up"), &at("real/work")) };
    Sources::open(&union).unwrap();
}

#[test]
fn files_and_folders_are_volumes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(Sources::open(&volume(dir.path())).unwrap().volumes[0].source.is_dir);
    assert!(!Sources::open(&volume(&file)).unwrap().volumes[0].source.is_dir);
}

#[test]
fn upper_and_work_must_be_apart() {
    let dir = tempfile::tempdir().unwrap();
    let upper = dir.path().join("up");
    let work = upper.join("work");
    std::fs::create_dir_all(&work).unwrap();
    assert!(matches!(Sources::open(&overlay(&upper, &work)), Err(SourceError::Nested { .. })));
    assert!(matches!(Sources::open(&overlay(&work, &upper)), Err(SourceError::Nested { .. })));
    assert!(matches!(Sources::open(&overlay(&upper, &upper)), Err(SourceError::Nested { .. })));
    // A symlink does not hide it.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&work, &link).unwrap();
    assert!(matches!(Sources::open(&overlay(&upper, &link)), Err(SourceError::Nested { .. })));
}

#[test]
fn upper_and_work_need_one_file_system() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let other = tempfile::tempdir_in("/var/tmp").unwrap();
    let result = Sources::open(&overlay(dir.path(), other.path()));
    assert!(matches!(result, Err(SourceError::TwoFilesystems { .. })));
}

#[test]
fn the_host_root_is_not_shared_for_a_work_folder() {
    let upper = tempfile::tempdir_in("/var").unwrap();
    let work = tempfile::tempdir_in("/opt").unwrap();
    let result = Sources::open(&overlay(upper.path(), work.path()));
    assert!(matches!(result, Err(SourceError::CommonRoot { .. })));
}

#[test]
fn an_upper_needs_trusted_xattrs() {
    let dir = open_dir(UsedBy::Container, What::Upper, Path::new("/proc/self")).unwrap();
    assert!(matches!(check_xattrs(&dir), Err(SourceError::NoXattrs { .. })));
}

#[test]
fn one_filesystem_looks_at_lowers_and_top() {
    let here = tempfile::tempdir_in("/var/tmp").unwrap();
    let there = tempfile::tempdir_in("/dev/shm").unwrap();
    let folder = |path: &Path| Top::Folder { path: path.to_owned(), read_only: false };
    let lowers = |paths: &[&Path]| paths.iter().map(|path| path.to_path_buf()).collect();
    let one = ShareSpec { lowers: lowers(&[here.path(), here.path()]), ..ShareSpec::new() };
    let two = ShareSpec { lowers: lowers(&[here.path(), there.path()]), ..ShareSpec::new() };
    assert!(Sources::open(&one).unwrap().one_filesystem());
    assert!(!Sources::open(&two).unwrap().one_filesystem());
    let root = ShareSpec { top: folder(here.path()), ..ShareSpec::new() };
    assert!(Sources::open(&root).unwrap().one_filesystem());
}
