//! `vmctr commit` and `vmctr diff`: what a container changed, as an image that every runtime runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::{Output, Running, eventually, run};
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::image;
use vmctr_tests::rig::terminal::Terminal;
use vmctr_tests::rig::vm::signal;

const IMAGE: &str = "vmctr.test/committed:1";
const SOON: Duration = Duration::from_secs(30);

/// More than a commit copies to let the container go on early, and work for minutes at the highest level.
const LARGE: &str = "head -c 100000000 /dev/urandom > /big";

/// Changes of every kind that a layer can tell.
const CHANGES: &str = "echo new > /new; echo more >> /etc/marker; rm /etc/group; rm -r /var/tmp; \
    mkdir -p /var/tmp/again; rm -r /home; mkdir /home; echo mine > /home/mine; ln /new /second; \
    ln -s /new /link; chown 70000:70001 /new; chmod 4755 /new; mkfifo /fifo; \
    touch -d @1000000000 /etc/passwd; : > '/a name'";

/// What tells whether two roots are the same, as far as a shell sees.
const LOOK: &str = "cat /new /home/mine /etc/marker; ls /etc /home /var/tmp; stat -c '%a %u:%g %h %F %n' /new \
    /second /link /fifo '/a name' /home/mine; stat -c '%a %u:%g %F %n' /home /var/tmp/again; stat -c %Y /etc/passwd";

fn vmctr(rig: &Rig, args: &[&str]) -> Output {
    run(rig.vmctr_command().args(args))
}

/// A container that has changed things and goes on.
fn changed<'rig>(rig: &'rig Rig, name: &str) -> Container<'rig> {
    let container = rig.container(name).args(["/bin/sleep", "1000"]).detached();
    container.sh(CHANGES).ok();
    container
}

fn commit(rig: &Rig, container: &Container<'_>, more: &[&str]) -> serde_json::Value {
    let args = [&["--json", "commit"], more, &[container.id(), IMAGE]].concat();
    vmctr(rig, &args).ok().json()
}

#[test]
fn a_committed_image_runs_under_both_runtimes_and_shows_what_the_container_showed() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "source");
    let seen = container.sh(LOOK).ok().text();
    let report = commit(&rig, &container, &["-c", "ENV COMMITTED=yes", "-m", "why"]);
    assert!(report["pause_micros"].as_u64().is_some_and(|pause| pause > 0), "{report}");
    assert_eq!(report["warnings"], serde_json::json!([]), "{report}");
    container.sh("echo after > /after").ok();
    container.remove();
    for runtime in ["io.containerd.runc.v2", "io.containerd.vmctr.v2"] {
        let script = format!("{LOOK}; echo $COMMITTED; ls /after /var/tmp/file 2>/dev/null");
        let look = rig.container_of(IMAGE, runtime).under(runtime).sh(&script).output();
        assert_eq!(look.text(), format!("{seen}yes\n"), "{runtime}: {look}");
    }
}

/// Another change of every kind in each generation, on what the ones before have left.
fn generation(round: u32) -> String {
    format!(
        "mkdir -p /t/in/{round}; cd /t; echo {round} >> grows; chmod 6{round}55 grows; chown {round}70000:9 grows; \
         rm -f only-*; : > only-{round}; ln grows in/{round}/linked; set-xattr grows user.round {round}; \
         set-xattr in capability {round}; set-xattr in user.empty ''; ln -s {round} in/{round}/symlink; \
         mkfifo -m 60{round} in/{round}/fifo; mknod in/{round}/device c {round} 300; mv moves-* moves-{round} \
         || mkdir moves-{round}; echo {round} > moves-{round}/{round}; touch -d @-{round}00 moves-{round}/{round}; \
         if [ -d swaps ]; then rm -r swaps; echo {round} > swaps; else rm -f swaps; mkdir swaps; : > swaps/{round}; fi; \
         head -c {round}000 /dev/zero > \"$(printf 'n\\n\\377')\"; chmod 1777 /t/in"
    )
}

#[test]
fn each_generation_begins_with_what_the_one_before_ended_with() {
    let rig = Rig::vmctr();
    let (set_xattr, show_tree) = (env!("CARGO_BIN_EXE_set-xattr"), env!("CARGO_BIN_EXE_show-tree"));
    rig.import_busybox(&[("bin/set-xattr", set_xattr.as_ref()), ("bin/show-tree", show_tree.as_ref())]);
    let (mut image, mut ended) = (image::BUSYBOX.to_owned(), String::new());
    for round in 0..5 {
        let run = rig.container_of(&image, &format!("round-{round}"));
        let container = run.args(["/bin/sleep", "1000"]).detached();
        let show = || container.sh("show-tree /t").ok().text();
        if round > 0 {
            assert_eq!(show(), ended, "round {round}");
        }
        container.sh(&generation(round)).ok();
        ended = show();
        image = format!("vmctr.test/round:{round}");
        vmctr(&rig, &["commit", "--verify", container.id(), &image]).ok();
        container.remove();
    }
    for kind in ["only-4", "user.round", "user.empty", "security.capability", "Some(\"grows\")", "moves-4/0"]
    {
        assert!(ended.contains(kind), "{kind} is not in {ended}");
    }
    let look =
        rig.container_of(&image, "last").under("io.containerd.runc.v2").sh("show-tree /t").output().ok();
    assert_eq!(look.text(), ended, "under runc");
}

#[test]
fn differences_are_listed_as_docker_lists_them() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "differs");
    let listed = vmctr(&rig, &["diff", container.id()]).ok().text();
    let lines: Vec<_> = listed.lines().collect();
    for line in ["A /new", "C /etc", "C /etc/marker", "D /etc/group", "A /home/mine", "A /second", "A /fifo"]
    {
        assert!(lines.contains(&line), "{line} is not in {listed}");
    }
    assert!(!listed.contains("/proc"), "{listed}");
    container.remove();
}

#[test]
fn what_stands_still_goes_on_also_when_the_committer_is_killed() {
    let rig = Rig::vmctr();
    let container = rig.container("beats").sh("while :; do echo x >> /beats; done").detached();
    container.sh(LARGE).ok();
    let folder = rig.new_folder("out").join("oci");
    let output = format!("oci:{}", folder.display());
    let mut command = rig.vmctr_command();
    command.args(["commit", "--compression", "zstd:19", "--output", &output, container.id()]);
    let committer = Running::start(&mut command);
    eventually("the container stands still", SOON, || container.sh("true").errors().contains("commit"));
    signal(committer.pid(), Signal::SIGKILL);
    committer.finish();
    let beats = || container.sh("wc -c < /beats").ok().text();
    let before = beats();
    eventually("the container goes on", SOON, || beats() != before);
    container.kill("KILL").ok();
    container.wait_for("STOPPED");
    container.remove();
}

#[test]
fn a_container_that_went_on_too_early_gives_no_image() {
    // The shim lets go of what is held by somebody who has not answered for so long.
    const WATCHDOG: Duration = Duration::from_secs(90);
    let rig = Rig::vmctr();
    let container = rig.container("early").sh("while :; do echo x >> /beats; done").detached();
    container.sh(LARGE).ok();
    let folder = rig.new_folder("out").join("oci");
    let output = format!("oci:{}", folder.display());
    let mut command = rig.vmctr_command();
    command.args(["commit", "--output", &output, "--compression", "zstd:19", container.id()]);
    let committer = Running::start(&mut command);
    eventually("the container stands still", SOON, || container.sh("true").errors().contains("commit"));
    signal(committer.pid(), Signal::SIGSTOP);
    eventually("the container goes on", WATCHDOG, || container.sh("true").code() == 0);
    signal(committer.pid(), Signal::SIGCONT);
    committer.finish().exits(125).fails_naming(&["too early"]);
    let index = fs::read_to_string(folder.join("index.json")).unwrap_or_default();
    assert!(!index.contains("digest"), "{index}");
    container.kill("KILL").ok();
    container.wait_for("STOPPED");
    container.remove();
}

/// The folder that a commit works in.
fn scratch_of(pid: u32) -> Option<PathBuf> {
    let opened = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let mut targets = opened.filter_map(|fd| fs::read_link(fd.path()).ok());
    let target = targets.find(|target| target.to_string_lossy().starts_with("/var/tmp/vmctr-scratch-"))?;
    Some(target.iter().take(4).collect())
}

#[test]
fn what_a_killed_commit_left_goes_with_the_next_one() {
    let rig = Rig::vmctr();
    let container = rig.container("left").args(["/bin/sleep", "1000"]).detached();
    container.sh("head -c 30000000 /dev/urandom > /big").ok();
    let out = rig.new_folder("out");
    let output = format!("oci:{}", out.join("killed").display());
    let mut command = rig.vmctr_command();
    command.args(["commit", "--compression", "zstd:19", "--output", &output, container.id()]);
    let committer = Running::start(&mut command);
    let mut left = None;
    eventually("it works in a folder", SOON, || {
        left = scratch_of(committer.pid());
        left.is_some()
    });
    signal(committer.pid(), Signal::SIGKILL);
    committer.finish();
    let output = format!("oci:{}", out.join("next").display());
    vmctr(&rig, &["commit", "--output", &output, container.id()]).ok();
    assert!(!left.expect("just found").exists());
    container.remove();
}

#[test]
fn an_upper_in_the_guest_is_committed_as_one_on_the_host() {
    let rig = Rig::vmctr();
    let container =
        rig.container("guest").annotation("io.vmctr.upper", "guest").args(["/bin/sleep", "1000"]).detached();
    // A link to a file of the image is shown by some kernels as a file of its own.
    container.sh(&format!("{CHANGES}; ln /etc/marker /linked")).ok();
    let seen = container.sh(LOOK).ok().text();
    commit(&rig, &container, &["--verify"]);
    container.remove();
    let look = rig.container_of(IMAGE, "look").under("io.containerd.runc.v2").sh(LOOK).output();
    assert_eq!(look.text(), seen, "{look}");
}

#[test]
fn a_stopped_container_can_be_committed_and_its_snapshot_is_untouched() {
    let rig = Rig::vmctr();
    let container = rig.container("stopped").sh(CHANGES).detached();
    container.wait_for("STOPPED");
    commit(&rig, &container, &[]);
    commit(&rig, &container, &[]);
    container.remove();
    rig.container_of(IMAGE, "look").sh("cat /new").output().ok().prints("new");
}

#[test]
fn a_new_folder_is_the_next_lower_layer() {
    let rig = Rig::vmctr();
    let root = rig.busybox_root("start", &[]);
    let (upper, folder) = (rig.new_folder("upper"), rig.new_folder("out").join("new"));
    let container = rig
        .container_in(&root, "folder")
        .annotation("io.vmctr.upper-dir", upper.display())
        .args(["/bin/sleep", "1000"])
        .detached();
    container.sh("echo new > /new; rm -r /home").ok();
    vmctr(&rig, &["commit", "--to-dir", folder.to_str().expect("text"), container.id()]).ok();
    container.remove();
    assert_eq!(fs::read_to_string(folder.join("new")).expect("there"), "new\n");
    let merged = rig.new_folder("merged");
    let mounted = Command::new("unshare")
        .args(["--mount", "sh", "-c"])
        .arg(format!(
            "mount -t overlay overlay -o lowerdir={}:{} {} && ls {}",
            folder.display(),
            root.display(),
            merged.display(),
            merged.display()
        ))
        .output()
        .expect("unshare runs");
    let listed = String::from_utf8_lossy(&mounted.stdout);
    assert!(listed.lines().any(|name| name == "new"), "{listed}");
    assert!(!listed.lines().any(|name| name == "home"), "{listed}");
}

#[test]
fn an_oci_folder_is_what_umoci_unpacks() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "oci");
    let out = rig.new_folder("out");
    let layout = out.join("oci");
    let output = format!("oci:{}:tag", layout.display());
    vmctr(&rig, &["commit", "--output", &output, "--compression", "gzip", container.id()]).ok();
    container.remove();
    let unpacked = out.join("bundle");
    let image = format!("{}:tag", layout.display());
    run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&unpacked)).ok();
    assert_eq!(fs::read_to_string(unpacked.join("rootfs/new")).expect("there"), "new\n");
    assert!(!unpacked.join("rootfs/etc/group").exists());
}

#[test]
fn equal_changes_give_equal_layers() {
    let rig = Rig::vmctr();
    let digest = |name: &str| {
        let container = changed(&rig, name);
        container.sh("find / -xdev -newermt @1700000000 -exec touch -h -d @1700000000 {} +");
        let report = commit(&rig, &container, &["--timestamp", "1600000000"]);
        container.remove();
        report["layer"].clone()
    };
    assert_eq!(digest("one"), digest("two"));
}

#[test]
fn a_verified_commit_shows_what_the_guest_sees_in_every_store() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "verified");
    let out = rig.new_folder("out");
    let at = |name: &str| out.join(name).display().to_string();
    let folder = at("folder");
    for more in [
        vec![],
        vec!["--timestamp", "1000000001"],
        vec!["--squash"],
        vec!["--subtree", "/home"],
        vec!["--subtree", "/etc/marker"],
        vec!["--output", &format!("oci:{}", at("layout"))],
        vec!["--output", &format!("oci-archive:{}", at("archive")), "--compression", "gzip"],
        vec!["--to-dir", &folder],
    ] {
        let report = commit(&rig, &container, &[&["--verify"], &more[..]].concat());
        assert_eq!(report["verified"], true, "{more:?}: {report}");
        assert!(report["pause_micros"].as_u64().is_some_and(|pause| pause > 0), "{report}");
    }
    container.sh("echo goes on").ok().prints("goes on");
    container.kill("KILL").ok();
    container.wait_for("STOPPED");
    assert_eq!(commit(&rig, &container, &["--verify"])["verified"], true);
    container.remove();
}

#[test]
fn a_verification_finds_a_base_that_was_changed_behind_the_guests_back() {
    let rig = Rig::vmctr();
    let root = rig.busybox_root("start", &[]);
    let (upper, folder) = (rig.new_folder("upper"), rig.new_folder("out").join("new"));
    let container = rig
        .container_in(&root, "folder")
        .annotation("io.vmctr.upper-dir", upper.display())
        .args(["/bin/sleep", "1000"])
        .detached();
    container.sh("cat /etc/marker; echo new > /new").ok();
    // Of the same length and time: the guest has no reason to read it again.
    let (marker, time) =
        (root.join("etc/marker"), root.join("etc/marker").metadata().expect("there").modified());
    let changed = fs::read(&marker).expect("readable").to_ascii_uppercase();
    fs::write(&marker, changed).expect("writable");
    let file = fs::File::options().write(true).open(&marker).expect("writable");
    file.set_modified(time.expect("a time")).expect("settable");
    let args = ["commit", "--verify", "--to-dir", folder.to_str().expect("text"), container.id()];
    let output = vmctr(&rig, &args).exits(1);
    let differs = output.errors();
    assert!(differs.contains("differs: /etc/marker"), "{output}");
    assert_eq!(differs.lines().count(), 1, "{output}");
    container.remove();
}

#[test]
fn what_was_paused_stays_paused() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "paused");
    container.task("pause", &[]).ok();
    let report = commit(&rig, &container, &["--verify"]);
    assert_eq!((&report["pause_micros"], &report["verified"]), (&serde_json::Value::Null, &true.into()));
    assert_eq!(container.status().as_deref(), Some("PAUSED"));
    container.task("resume", &[]).ok();
    container.sh("cat /new").ok().prints("new");
    container.remove();
}

#[test]
fn without_a_pause_what_changes_is_named() {
    let rig = Rig::vmctr();
    let container = rig.container("writes").sh("while :; do date >> /log; done").detached();
    container.sh("head -c 30000000 /dev/urandom > /big; echo still > /still").ok();
    let report = commit(&rig, &container, &["--pause=false"]);
    assert_eq!(report["pause_micros"], serde_json::Value::Null, "{report}");
    let warnings = report["warnings"].to_string();
    assert!(!warnings.contains("still"), "{warnings}");
    vmctr(&rig, &["commit", "--pause=false", "--verify", container.id(), IMAGE])
        .exits(125)
        .fails_naming(&["--verify", "pause"]);
    container.kill("KILL").ok();
    container.wait_for("STOPPED");
    container.remove();
    rig.container_of(IMAGE, "look")
        .under("io.containerd.runc.v2")
        .sh("cat /still")
        .output()
        .ok()
        .prints("still");
}

#[test]
fn long_commits_show_phase_bytes_and_rate_on_a_terminal_only() {
    let rig = Rig::vmctr();
    let container = rig.container("progress").args(["/bin/sleep", "1000"]).detached();
    container.sh("head -c 30000000 /dev/urandom > /big").ok();
    let out = rig.new_folder("out");
    let command = |name: &str, more: &[&str]| {
        let mut command = rig.vmctr_command();
        let output = format!("oci:{}", out.join(name).display());
        // Takes seconds at this level.
        command.args(["commit", "--compression", "zstd:19", "--output", &output]).args(more);
        command.arg(container.id());
        command
    };
    let mut terminal = Terminal::run(&mut command("terminal", &[]), (100, 24));
    terminal.expect("writing the layer: ");
    terminal.expect("iB/s");
    terminal.expect("Entries");
    let screen = terminal.screen();
    assert!(!screen.contains(" 0 B"), "nothing was read yet and that is shown: {screen:?}");
    assert_eq!(terminal.finish(), 0);
    let mut quiet = Terminal::run(&mut command("quiet", &["--quiet"]), (100, 24));
    quiet.expect("sha256:");
    assert!(!quiet.screen().contains("writing"), "{:?}", quiet.screen());
    assert_eq!(quiet.finish(), 0);
    let piped = run(&mut command("piped", &[])).ok();
    let warnings: Vec<_> =
        piped.errors().lines().filter(|line| !line.contains("warning")).map(String::from).collect();
    assert!(warnings.is_empty(), "{piped}");
    container.remove();
}

#[test]
fn what_cannot_be_committed_is_named() {
    let rig = Rig::vmctr();
    vmctr(&rig, &["commit", "nobody", IMAGE]).exits(127).fails_naming(&["nobody"]);
    let container = changed(&rig, "refused");
    let id = container.id();
    vmctr(&rig, &["commit", id]).exits(125).fails_naming(&["name", "--to-dir"]);
    vmctr(&rig, &["commit", "-c", "RUN x", id, IMAGE]).exits(125).fails_naming(&["RUN"]);
    vmctr(&rig, &["commit", "--compression", "xz", id, IMAGE]).exits(125).fails_naming(&["xz", "zstd"]);
    vmctr(&rig, &["commit", "--subtree", "../x", id, IMAGE]).exits(125).fails_naming(&["../x"]);
    vmctr(&rig, &["commit", "--subtree", "/no/such", id, IMAGE]).exits(125).fails_naming(&["/no/such"]);
    vmctr(&rig, &["commit", "--to-dir", "/proc/new", id]).exits(125).fails_naming(&["/proc/new"]);
    container.sh("touch /etc/.wh.passwd").ok();
    vmctr(&rig, &["commit", id, IMAGE]).exits(125).fails_naming(&[".wh.passwd"]);
    assert!(!rig.ctr_run(&["images", "ls", "-q"]).text().contains(IMAGE));
    container.sh("echo goes on").ok().prints("goes on");
    container.remove();
    let root = rig.busybox_root("plain", &[]);
    let plain = rig.container_in(&root, "plain").args(["/bin/sleep", "1000"]).detached();
    vmctr(&rig, &["commit", plain.id(), IMAGE]).exits(125).fails_naming(&["one folder"]);
    plain.remove();
}

#[test]
fn an_image_in_dockers_format_runs_with_its_instructions() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "docker");
    let instructions =
        ["-c", "ENTRYPOINT [\"/bin/echo\"]", "-c", "CMD [\"$A\", \"c d\"]", "-c", "LABEL l=\"x y\""];
    commit(&rig, &container, &[&["--format", "docker", "--compression", "gzip"], &instructions[..]].concat());
    let listed = rig.ctr_run(&["images", "ls"]).ok().text();
    let ours = listed.lines().find(|line| line.starts_with(IMAGE)).expect("it is there");
    assert!(ours.contains("application/vnd.docker.distribution.manifest.v2+json"), "{ours}");
    let lines = vmctr(&rig, &["--json", "diff", container.id()]).ok().json();
    let deleted = serde_json::json!({"change": "D", "path": "/etc/group"});
    assert!(lines.as_array().is_some_and(|lines| lines.contains(&deleted)), "{lines}");
    container.remove();
    let run = rig.container_of(IMAGE, "look").under("io.containerd.runc.v2");
    run.output().ok().prints("$A c d");
}

#[test]
fn changes_outlive_the_image_that_they_were_made_on() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "orphan");
    rig.ctr_run(&["images", "rm", "--sync", image::BUSYBOX]).ok();
    let out = rig.new_folder("out");
    let (archive, folder) = (out.join("archive"), out.join("new"));
    let output = format!("oci-archive:{}", archive.display());
    let args = ["commit", "--output", &output, "--to-dir", folder.to_str().expect("text"), container.id()];
    let done = vmctr(&rig, &args).ok();
    assert!(done.errors().contains(image::BUSYBOX), "what is missing is not named: {done}");
    assert_eq!(fs::read_to_string(folder.join("new")).expect("there"), "new\n");
    let listed = run(Command::new("tar").arg("-tf").arg(&archive)).ok().text();
    assert!(listed.contains("index.json"), "{listed}");
    vmctr(&rig, &["commit", container.id(), IMAGE]).exits(125).fails_naming(&[image::BUSYBOX, "--squash"]);
    commit(&rig, &container, &["--squash"]);
    container.remove();
    rig.container_of(IMAGE, "look").sh("cat /new").output().ok().prints("new");
}

#[test]
fn layers_are_listed_and_verified() {
    let rig = Rig::vmctr();
    let container = changed(&rig, "layers");
    commit(&rig, &container, &[]);
    container.remove();
    let listed = vmctr(&rig, &["layer", "ls", IMAGE]).ok().text();
    for entry in ["whiteout", "etc/group", "a name", "70000:70001", "4755"] {
        assert!(listed.contains(entry), "{entry} is not in {listed}");
    }
    vmctr(&rig, &["layer", "verify", IMAGE]).ok();
    let damaged = rig.new_folder("damaged").join("layer.tar");
    fs::write(&damaged, [b'x'; 2048]).expect("writable");
    let path = |path: &Path| path.to_str().expect("text").to_owned();
    vmctr(&rig, &["layer", "verify", &path(&damaged)]).exits(1);
    vmctr(&rig, &["layer", "ls", "no/such:image"]).exits(127).fails_naming(&["no/such:image"]);
}
