//! `vmctr mount`: a running container's root on the host, as a user sees it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::sys::signal::Signal;
use serde_json::Value;
use vmctr_tests::rig::command::{Output, Running, TIME_LIMIT, eventually, run};
use vmctr_tests::rig::container::{Container, Run};
use vmctr_tests::rig::vm::{Vm, signal};
use vmctr_tests::rig::{Rig, proc};

/// What is remembered is at most a second old, and a mount whose container is gone says so within two.
const SOON: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder to mount on.
struct Place<'rig> {
    rig: &'rig Rig,
    dir: PathBuf,
}

impl<'rig> Place<'rig> {
    fn new(rig: &'rig Rig, name: &str) -> Self {
        Self { rig, dir: rig.new_folder(name) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_else(|e| panic!("cannot read {name}: {e}"))
    }

    fn vmctr(&self, args: &[&str]) -> Output {
        run(self.rig.vmctr_command().args(args))
    }

    fn try_mount(&self, container: &str, more: &[&str]) -> Output {
        let dir = self.dir.to_string_lossy();
        self.vmctr(&[&["mount", container, &dir], more].concat())
    }

    fn mount(&self, container: &Container<'_>) {
        self.try_mount(container.id(), &[]).ok();
    }

    fn try_umount(&self, more: &[&str]) -> Output {
        let dir = self.dir.to_string_lossy();
        self.vmctr(&[&["umount", &dir], more].concat())
    }

    fn umount(&self) {
        self.try_umount(&[]).ok();
        assert!(self.view().is_none(), "it is still listed");
        assert!(is_empty(&self.dir));
    }

    /// What `vmctr union ls` says of it.
    fn view(&self) -> Option<Value> {
        let list = self.vmctr(&["union", "ls", "--json"]).ok().json();
        let list = list.as_array().expect("a list").clone();
        list.into_iter().find(|view| view["mountpoint"] == self.dir.to_string_lossy().as_ref())
    }

    fn process(&self) -> u32 {
        let view = self.view().expect("it is listed");
        u32::try_from(view["pid"].as_u64().expect("it lives")).expect("a process ID")
    }

    fn fails(&self) -> bool {
        let error = fs::write(self.at("after"), "x").err().and_then(|error| error.raw_os_error());
        let failed = |error| matches!(error, Some(libc::EIO | libc::ENOTCONN));
        failed(error) && failed(fs::read_dir(&self.dir).err().and_then(|error| error.raw_os_error()))
    }
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).expect("readable").next().is_none()
}

fn idle<'rig>(rig: &'rig Rig, name: &str) -> Container<'rig> {
    rig.container(name).args(["/bin/sleep", "3600"]).detached()
}

/// Waits for go-N in the volume, adds what /ask says to /answers, and says done-N.
const ANSWER: &str = "i=1; while true; do while [ ! -e /vol/go-$i ]; do usleep 10000; done; \
                      cat /ask >> /answers; touch /vol/done-$i; i=$((i+1)); done";

/// Both sides write in turns and must see at once what the other wrote and closed.
fn each_side_sees_the_other<'rig>(rig: &'rig Rig, name: &str, choose: impl FnOnce(Run<'rig>) -> Run<'rig>) {
    let volume = rig.new_folder(&format!("vol-{name}"));
    let run = choose(rig.container(name).bind(&volume, "/vol", "rbind:rw"));
    let container = run.sh(ANSWER).detached();
    let place = Place::new(rig, &format!("mnt-{name}"));
    place.mount(&container);
    let mut expected = String::new();
    for turn in 1..=10 {
        // The answers are in the kernel's caches, and grow.
        assert_eq!(fs::read_to_string(place.at("answers")).unwrap_or_default(), expected, "{name}");
        let question = format!("question {turn}\n");
        fs::write(place.at("ask"), &question).expect("writable");
        File::create(volume.join(format!("go-{turn}"))).expect("writable");
        let done = volume.join(format!("done-{turn}"));
        eventually("the container answers", TIME_LIMIT, || done.exists());
        expected += &question;
        assert_eq!(place.text("answers"), expected, "{name}, turn {turn}");
    }
    place.umount();
    assert_eq!(container.sh("cat /answers").ok().text(), expected);
    container.remove();
}

#[test]
fn each_side_sees_at_once_what_the_other_wrote_and_closed() {
    let rig = Rig::vmctr();
    each_side_sees_the_other(&rig, "template", |run| run);
    each_side_sees_the_other(&rig, "guest-upper", |run| run.annotation("io.vmctr.upper", "guest"));
    each_side_sees_the_other(&rig, "cold", |run| run.annotation("io.vmctr.start", "cold"));
}

#[test]
fn a_container_from_the_pool_is_mounted_too() {
    let rig = Rig::vmctr_with("[vm]\nstart = \"pool\"\n[pool]\nsize = 1\n");
    let pool = Running::start(rig.vmctr_command().args(["pool", "run"]).stdin(Stdio::null()));
    eventually("a VM waits", TIME_LIMIT, || {
        let list = run(rig.vmctr_command().args(["pool", "ls", "--json"]));
        list.code() == 0 && list.json()[0]["qemu"].is_u64()
    });
    each_side_sees_the_other(&rig, "pool", |run| run);
    drop(pool);
}

#[test]
fn names_and_attributes_follow_within_a_second() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.mount(&container);
    // The image's files are there; what is mounted in the container is not.
    assert_eq!(place.text("etc/marker"), container.sh("cat /etc/marker").ok().text());
    assert!(is_empty(&place.at("proc")) && is_empty(&place.at("sys")));
    assert!(!place.at("new").exists());
    container
        .sh("echo new > /new; mkdir /dir; chmod 600 /etc/marker; rm /etc/group; mv /etc/passwd /dir")
        .ok();
    eventually("the host sees it", SOON, || {
        let mode = fs::metadata(place.at("etc/marker")).map(|meta| meta.permissions().mode() & 0o777);
        place.at("new").exists()
            && place.at("dir/passwd").exists()
            && !place.at("etc/group").exists()
            && !place.at("etc/passwd").exists()
            && mode.is_ok_and(|mode| mode == 0o600)
    });

    let script = "echo host > from-host; mkdir -m 1777 made; mv new made/old; ln -s made soft; ln made/old hard; \
                  chown 1000:1000 from-host; chmod 4755 from-host; truncate -s 1 made/old";
    run(Command::new("sh").args(["-ec", script]).current_dir(&place.dir)).ok();
    let look = "cat /from-host; stat -c '%a %u:%g %h %F' /from-host /made /made/old; readlink /soft; \
                stat -c %s /hard; test ! -e /new";
    let seen = "host\n4755 1000:1000 1 regular file\n1777 0:0 2 directory\n644 0:0 2 regular file\nmade\n1";
    container.sh(look).ok().prints(seen);

    // Whoever is not root may do what the files' permissions say.
    let by_user = |script: &str| {
        let user = ["--reuid", "1000", "--regid", "1000", "--clear-groups", "sh", "-c", script];
        run(Command::new("setpriv").args(user).current_dir(&place.dir))
    };
    by_user("cat from-host; touch made/mine").ok().prints("host");
    assert!(by_user("cat etc/marker").errors().contains("Permission denied"));
    assert!(by_user("touch no").errors().contains("Permission denied"));
    container.sh("stat -c %u:%g /made/mine").ok().prints("1000:1000");
    place.umount();
    container.remove();
}

#[test]
fn what_the_host_syncs_is_in_the_upper_folder() {
    let rig = Rig::vmctr();
    let root = rig.busybox_root("start", &[]);
    let (upper, place) = (rig.new_folder("upper"), Place::new(&rig, "mnt"));
    let run = rig.container_in(&root, "c").annotation("io.vmctr.upper-dir", upper.display());
    let container = run.args(["/bin/sleep", "1000"]).detached();
    place.mount(&container);
    let mut file = File::create(place.at("synced")).expect("writable");
    file.write_all(b"kept\n").and_then(|()| file.sync_all()).expect("synced");
    assert_eq!(fs::read_to_string(upper.join("synced")).expect("it is there"), "kept\n");
    drop(file);
    place.umount();
    container.remove();
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.try_mount(container.id(), &["--ro"]).ok();
    let error = fs::write(place.at("new"), "").expect_err("it is read-only");
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    container.sh("echo written > /new").ok();
    assert_eq!(place.text("new"), "written\n");
    place.umount();
    container.remove();
}

#[test]
fn mounts_are_listed_with_their_container() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let (one, two) = (Place::new(&rig, "one"), Place::new(&rig, "two"));
    one.mount(&container);
    two.mount(&container);
    for place in [&one, &two] {
        let view = place.view().expect("it is listed");
        assert_eq!((&view["kind"], &view["state"]), (&"container".into(), &"mounted".into()));
        assert_eq!(view["container"], container.id());
        let dir = place.dir.to_string_lossy();
        let shown = place.vmctr(&["union", "inspect", &dir]).ok().text();
        assert!(shown.contains(container.id()), "{shown}");
        let mounts = proc::mounts(std::process::id());
        assert!(
            mounts.iter().any(|mount| Path::new(&mount.point) == place.dir && mount.kind == "fuse.vmctr")
        );
    }
    fs::write(one.at("shared"), "both\n").expect("writable");
    assert_eq!(two.text("shared"), "both\n");
    let again = one.try_mount(container.id(), &[]);
    assert!(again.code() == 125 && again.errors().contains("A container is mounted on"), "{again}");
    one.umount();
    fs::write(two.at("later"), "still\n").expect("writable");
    container.sh("cat /shared /later").ok().prints("both\nstill");
    two.umount();
    container.remove();
}

#[test]
fn when_the_container_ends_the_mount_fails_and_can_be_taken_away() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.mount(&container);
    assert_eq!(place.text("etc/marker"), container.sh("cat /etc/marker").ok().text());
    container.kill("KILL").ok();
    container.wait_for("STOPPED");
    eventually("the mount fails", SOON, || place.fails());
    let view = || place.view().expect("it is listed");
    eventually("it is listed as lost", SOON, || view()["state"] == "lost");
    let view = view();
    assert!(view["lost"].as_str().is_some_and(|why| why.contains("has ended")), "{view}");
    let process = place.process();
    run(Command::new("umount").arg(&place.dir)).ok();
    eventually("the process ends", PATIENCE, || !proc::is_alive(process));
    assert!(place.view().is_none());
    assert_eq!(container.delete(), 137);
}

#[test]
fn a_container_is_deleted_while_its_files_are_open_on_the_host() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.mount(&container);
    let mut open = File::create(place.at("open")).expect("writable");
    open.write_all(b"x").expect("writable");
    let vm = Vm::of(&rig, container.id());
    container.remove();
    eventually("the mount fails", SOON, || place.fails());
    eventually("the VM and its shim end", PATIENCE, || !vm.is_alive());
    assert!(open.write_all(b"x").is_err());
    let busy = place.try_umount(&[]);
    assert!(busy.code() == 125 && busy.errors().contains("-l"), "{busy}");
    drop(open);
    place.umount();
}

#[test]
fn when_the_vm_is_killed_the_mount_fails() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.mount(&container);
    signal(Vm::of(&rig, container.id()).qemu, Signal::SIGKILL);
    eventually("the mount fails", SOON, || place.fails());
    place.umount();
    container.remove();
}

#[test]
fn when_the_mounts_process_is_killed_the_container_goes_on() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.mount(&container);
    fs::write(place.at("kept"), "kept\n").expect("writable");
    signal(place.process(), Signal::SIGKILL);
    eventually("the mount fails", SOON, || place.fails());
    let is_dead = || place.view().is_some_and(|view| view["state"] == "dead");
    // The kernel closes its files first, which ends the mount.
    eventually("it is listed as dead", SOON, is_dead);
    let view = place.view().expect("it is listed");
    assert!(view["clean_up"].as_str().is_some_and(|command| command.starts_with("vmctr umount /")), "{view}");
    container.sh("cat /kept").ok().prints("kept");
    place.umount();
    place.mount(&container);
    assert_eq!(place.text("kept"), "kept\n");
    place.umount();
    container.remove();
}

#[test]
fn a_mount_in_use_is_taken_away_lazily_only() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.mount(&container);
    let mut file = File::open(place.at("etc/marker")).expect("readable");
    let busy = place.try_umount(&[]);
    assert!(busy.code() == 125 && busy.errors().contains("-l"), "{busy}");
    place.try_umount(&["-l"]).ok();
    assert!(is_empty(&place.dir));
    let mut text = String::new();
    file.read_to_string(&mut text).expect("still readable");
    assert_eq!(text, container.sh("cat /etc/marker").ok().text());
    drop(file);
    eventually("the process ends", PATIENCE, || place.view().is_none());
    container.remove();
}

#[test]
fn what_cannot_be_mounted_is_refused_in_words() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    fs::write(rig.new_folder("full").join("file"), "").expect("writable");
    let at = |name: &str| rig.folder().join(name).display().to_string();
    for (dir, words) in
        [("none", "Cannot use the mountpoint"), ("full", "is not empty"), ("full/file", "is not a folder")]
    {
        let output = place.vmctr(&["mount", container.id(), &at(dir)]);
        assert!(output.code() == 125 && output.errors().contains(words), "{output} does not say {words:?}");
    }
    let none = place.try_mount("nobody", &[]);
    assert!(none.code() == 127 && none.errors().contains("No container nobody"), "{none}");
    let nothing = place.try_umount(&[]);
    assert!(
        nothing.code() == 127 && nothing.errors().contains("No union or container is mounted"),
        "{nothing}"
    );

    let foreign = rig.container("runc").under("io.containerd.runc.v2").args(["/bin/sleep", "1000"]);
    let foreign = foreign.detached();
    let refused = place.try_mount(foreign.id(), &[]);
    assert!(refused.code() == 125 && refused.errors().contains("io.containerd.runc.v2"), "{refused}");
    foreign.remove();

    container.kill("KILL").ok();
    container.wait_for("STOPPED");
    let stopped = place.try_mount(container.id(), &[]);
    assert!(stopped.code() == 125 && stopped.errors().contains("The container does not run"), "{stopped}");
    container.task("delete", &[]);
    let deleted = place.try_mount(container.id(), &[]);
    assert!(deleted.code() == 125 && deleted.errors().contains("does not run"), "{deleted}");
    container.forget();
}

/// Adds a line to one file, then to the other, until told to stop; returns how many there are.
fn write_pairs(one: &Path, other: &Path, stop: &AtomicBool) -> usize {
    let open = |path| File::options().create(true).append(true).open(path).expect("writable");
    let (mut one, mut other) = (open(one), open(other));
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        for file in [&mut one, &mut other] {
            writeln!(file, "{count}").expect("the host's writes wait, and are done");
        }
        count += 1;
    }
    count
}

/// The writer ends however the test does.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_commit_sees_one_moment_of_what_the_host_writes() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "c");
    let place = Place::new(&rig, "mnt");
    place.mount(&container);
    let (one, other, stop) = (place.at("one"), place.at("other"), AtomicBool::new(false));
    let lines = |path: &Path| fs::read_to_string(path).expect("there").lines().count();
    let out = rig.new_folder("out");
    let written = thread::scope(|scope| {
        let writer = scope.spawn(|| write_pairs(&one, &other, &stop));
        let ending = SetOnDrop(&stop);
        eventually("something is written", PATIENCE, || one.exists() && other.exists());
        for round in 0..3 {
            let folder = out.join(round.to_string());
            let args =
                ["--json", "commit", "--verify", "--to-dir", &folder.to_string_lossy(), container.id()];
            let report = place.vmctr(&args).ok().json();
            assert_eq!(report["verified"], true, "{report}");
            let (ones, others) = (lines(&folder.join("one")), lines(&folder.join("other")));
            assert!(ones == others || ones == others + 1, "{ones} lines, and {others}");
        }
        drop(ending);
        writer.join().expect("the writer does not fail")
    });
    assert_eq!((lines(&one), lines(&other)), (written, written));
    place.umount();
    container.sh("wc -l < /one").ok().prints(&written.to_string());
    container.remove();
}
