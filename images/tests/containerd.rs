//! Commits into a real containerd: what its snapshotters show, and what its own unpacking shows, equals
//! the container's merged view.

#![allow(clippy::unwrap_used)] // helpers of tests

mod rig;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use containerd_client::Client;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestRunner};
use rig::{LIMIT, Overlay, differences, folder, layers, ops, private_mounts, show};
use vmctr_images::commit::{Changes, Committed, ContainerdOrder, Plan, Unpack, to_archive, to_containerd};
use vmctr_images::config::{Base, Build, Format};
use vmctr_images::layer::{Compression, LayerOptions};
use vmctr_images::path::TreePath;
use vmctr_images::store::containerd::Store;
use vmctr_images::upper::{Note, Scope};

const OPTIONS: LayerOptions = LayerOptions { compression: Compression::Zstd(3), clamp: None, limit: LIMIT };

/// A containerd of the test's own, ended with it.
struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn start(dir: &Path) -> Self {
        let at = |name: &str| dir.join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \
             \"io.containerd.internal.v1.opt\"]\n[grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("sock"),
            at("ttrpc")
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let log = fs::File::create(dir.join("log")).unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(dir.join("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self { child, socket: dir.join("sock") };
        let until = Instant::now() + Duration::from_secs(60);
        while !daemon.command(&["version"]).output().unwrap().status.success() {
            assert!(Instant::now() < until, "{}", fs::read_to_string(dir.join("log")).unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
        daemon
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(&self.socket).args(arguments);
        ctr
    }

    fn ctr(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "ctr {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn build() -> Build {
    let instructions = vec!["ENV A=1".parse().unwrap()];
    Build { instructions, author: None, message: None, created: 0, format: Format::Oci, squash: false }
}

/// The lowers as an image that containerd has unpacked.
fn import_base(daemon: &Daemon, dir: &Path, lowers: &[PathBuf], snapshotter: &str) -> Base {
    let (layers, root) = (layers(lowers), TreePath::root());
    let changes = Changes { layers: &layers, scope: Scope::Everything, subtree: &root };
    let (empty, build) = (Base::empty(), build());
    let plan = Plan { changes, layer: OPTIONS, base: &empty, build: &build, tag: Some("base") };
    let file = dir.join(format!("base-{snapshotter}.tar"));
    let made = to_archive(&plan, &file, &mut |_| Ok(None), &mut |_| Ok(())).unwrap();
    let file = file.to_str().unwrap();
    daemon.ctr(&["image", "import", "--base-name", "test/base", "--snapshotter", snapshotter, file]);
    Base::parse(&made.image.config, &made.image.manifest).unwrap()
}

fn commit(
    daemon: &Daemon,
    stack: &[PathBuf],
    base: Base,
    name: &str,
    snapshotter: &str,
) -> Result<Committed, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = Client::from_path(&daemon.socket).await.unwrap();
        let store = Store::lease(client, "default").await.unwrap();
        let order = ContainerdOrder {
            layers: layers(stack),
            scope: Scope::Changes,
            subtree: TreePath::root(),
            layer: OPTIONS,
            base,
            build: build(),
            name: name.to_owned(),
            unpack: Unpack::By(snapshotter.to_owned()),
        };
        let made =
            to_containerd(&store, order, Box::new(|_| Ok(()))).await.map_err(|error| format!("{error:?}"));
        store.release(false).await.unwrap();
        made
    })
}

/// What containerd shows of an image.
fn same_as_mounted(daemon: &Daemon, dir: &Path, name: &str, snapshotter: &str, case: (&Path, &[Note])) {
    let target = dir.join("mounted");
    fs::create_dir_all(&target).unwrap();
    let path = target.to_str().unwrap();
    daemon.ctr(&["image", "mount", "--snapshotter", snapshotter, name, path]);
    let (merged, notes) = case;
    let mut found = rig::without_split_links(differences(&target, merged), notes);
    // The native snapshotter copies a tree for each view, all but its root's time.
    found.retain(|difference| snapshotter != "native" || !difference.path.is_root());
    daemon.ctr(&["image", "unmount", "--rm", "--snapshotter", snapshotter, path]);
    assert!(found.is_empty(), "{name}:\n{}", show(&found));
}

/// containerd's own unpacking lets folders inherit default ACLs, knows no time before 1970 and leaves
/// out attributes of symbolic links, which only `trusted.*` can be.
fn containerd_can(op: &ops::Op) -> bool {
    match op {
        ops::Op::Xattr(_, name, _) => ![ops::DEFAULT_ACL, ops::TRUSTED].contains(name),
        ops::Op::Touch(_, seconds, _) => *seconds > 0,
        _ => true,
    }
}

/// Trees from the random operations' generator.
fn stages(count: usize) -> Vec<Vec<Vec<ops::Op>>> {
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
    let strategy = (ops::ops(80), ops::ops(30), ops::ops(60)).prop_map(|(a, b, c)| vec![a, b, c]);
    let mut cases: Vec<Vec<Vec<ops::Op>>> =
        (0..count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect();
    cases.iter_mut().flatten().for_each(|stage| stage.retain(containerd_can));
    cases
}

#[test]
fn what_containerd_shows_is_what_the_container_saw() {
    private_mounts();
    let daemon_dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(daemon_dir.path());
    daemon.ctr(&["namespace", "create", "other"]);
    for (number, stages) in stages(16).iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let snapshotter = if number % 4 == 3 { "native" } else { "overlayfs" };
        let options = "index=off,redirect_dir=on,metacopy=on";
        let base = folder(&dir, "base");
        ops::run(&base, &stages[0]);
        let first = Overlay::mount(&folder(&dir, "1"), std::slice::from_ref(&base), options);
        ops::run(&first.merged, &stages[1]);
        let lowers = [first.upper.clone(), base];
        let second = Overlay::mount(&folder(&dir, "2"), &lowers, options);
        ops::run(&second.merged, &stages[2]);
        let stack = [std::slice::from_ref(&second.upper), &lowers[..]].concat();

        let parsed = import_base(&daemon, dir.path(), &lowers, snapshotter);
        let name = format!("docker.io/test/new:{number}");
        let made = commit(&daemon, &stack, parsed, &name, snapshotter).unwrap();
        assert_eq!(made.missing, []);
        let chain = made.image.chain_id().unwrap().to_string();
        assert!(daemon.ctr(&["snapshots", "--snapshotter", snapshotter, "ls"]).contains(&chain));
        same_as_mounted(&daemon, dir.path(), &name, snapshotter, (&second.merged, &made.notes.kept));

        // Another namespace has no snapshot of it: containerd unpacks by itself.
        let archive = dir.path().join("export.tar");
        let archive = archive.to_str().unwrap();
        daemon.ctr(&["image", "export", archive, &name]);
        let output = daemon
            .command(&["--namespace", "other", "image", "import", "--snapshotter", "native", archive])
            .output();
        assert!(output.unwrap().status.success());
        let target = folder(&dir, "unpacked");
        let path = target.to_str().unwrap();
        daemon.ctr(&["--namespace", "other", "image", "mount", "--snapshotter", "native", &name, path]);
        let mut found = rig::without_split_links(differences(&target, &second.merged), &made.notes.kept);
        // containerd does not apply a layer's word on the root folder, and keeps attributes of folders.
        let lost = |path: &TreePath| {
            made.notes.kept.iter().any(|note| matches!(note, Note::LostXattr(lost, _) if lost == path))
        };
        found.retain(|difference| !difference.path.is_root() && !lost(&difference.path));
        daemon.ctr(&["--namespace", "other", "image", "unmount", "--rm", "--snapshotter", "native", path]);
        assert!(found.is_empty(), "containerd's own unpacking, case {number}:\n{}", show(&found));
    }
    assert_eq!(daemon.ctr(&["leases", "ls", "-q"]), "");
}

#[test]
fn a_commit_that_fails_leaves_nothing_in_containerd() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let [upper, lower] = ["upper", "lower"].map(|name| folder(&dir, name));
    fs::write(lower.join("x"), "x").unwrap();
    let base = import_base(&daemon, dir.path(), std::slice::from_ref(&lower), "overlayfs");
    let (blobs, snapshots) = (daemon.ctr(&["content", "ls", "-q"]), daemon.ctr(&["snapshots", "ls"]));
    // More than is on its way at a time, then what a layer cannot say.
    fs::write(upper.join("a"), vec![7; 16 << 20]).unwrap();
    fs::write(upper.join("z.wh"), "").unwrap();
    fs::write(upper.join(".wh.z"), "").unwrap();
    let error =
        commit(&daemon, &[upper.clone(), lower.clone()], base.clone(), "test/new", "overlayfs").unwrap_err();
    assert!(error.contains("ReservedName"), "{error}");
    assert_eq!(daemon.ctr(&["content", "active"]).lines().count(), 1);
    // The garbage collection that ends a commit may also take what the import left.
    let left = daemon.ctr(&["content", "ls", "-q"]);
    assert!(left.lines().all(|blob| blobs.contains(blob)), "{left}");
    assert_eq!(daemon.ctr(&["snapshots", "ls"]), snapshots);
    assert!(!daemon.ctr(&["image", "ls", "-q"]).contains("test/new"));

    // The same name serves the next attempt, and an image of that name gives way.
    fs::remove_file(upper.join(".wh.z")).unwrap();
    let one =
        commit(&daemon, &[upper.clone(), lower.clone()], base.clone(), "test/new", "overlayfs").unwrap();
    fs::write(upper.join("b"), "b").unwrap();
    let two = commit(&daemon, &[upper, lower], base, "test/new", "overlayfs").unwrap();
    let listed = daemon.ctr(&["image", "ls"]);
    assert!(listed.contains(&two.image.manifest_descriptor.digest.to_string()), "{listed}");
    assert!(!listed.contains(&one.image.manifest_descriptor.digest.to_string()), "{listed}");
    assert_eq!(daemon.ctr(&["leases", "ls", "-q"]), "");
}
