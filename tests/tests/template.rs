//! Containers whose VMs are restored from a template: made on first use, each VM itself, and a boot instead
//! whenever something is wrong with it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmctr_tests::rig::command::{TIME_LIMIT, eventually, run};
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::vm::{Vm, signal};
use vmctr_tests::rig::{Rig, proc};

/// A rig with a template directory of its own.
fn rig() -> Rig {
    Rig::vmctr_with("[vm]\nstart = \"template\"\n")
}

fn idle<'rig>(rig: &'rig Rig, name: &str) -> Container<'rig> {
    rig.container(name).args(["/bin/sleep", "3600"]).detached()
}

fn templates(rig: &Rig) -> Vec<Value> {
    let list = run(rig.vmctr_command().args(["template", "ls", "--json"])).ok().json();
    list.as_array().expect("a list").clone()
}

fn create(rig: &Rig) -> String {
    run(rig.vmctr_command().args(["template", "create"])).ok().text().trim().to_owned()
}

fn folder(rig: &Rig, key: &str) -> PathBuf {
    rig.folder().join("templates").join(key)
}

/// How the container's VM started: "boot" or "restore".
fn start_of(rig: &Rig, id: &str) -> &'static str {
    let view = rig.inspect(id);
    let has = |name: &str| {
        view["phases"].as_array().is_some_and(|phases| phases.iter().any(|phase| phase["name"] == name))
    };
    match (has("boot"), has("restore")) {
        (true, false) => "boot",
        (false, true) => "restore",
        _ => panic!("{view}"),
    }
}

/// Starts a container and says how its VM started.
fn started(rig: &Rig, name: &str) -> &'static str {
    let container = idle(rig, name);
    let how = start_of(rig, container.id());
    container.sh("echo works").ok().prints("works");
    container.remove();
    how
}

fn warnings(rig: &Rig) -> usize {
    rig.daemon().log().lines().filter(|line| line.contains("boots instead of being restored")).count()
}

#[test]
fn the_first_container_boots_and_has_a_template_made_for_the_next() {
    let rig = rig();
    assert_eq!(templates(&rig), [Value::Null; 0]);
    assert_eq!(started(&rig, "first"), "boot");
    eventually("the template is made", TIME_LIMIT, || !templates(&rig).is_empty());
    let list = templates(&rig);
    assert_eq!((list.len(), &list[0]["current"], &list[0]["memory_mib"]), (1, &true.into(), &512.into()));
    eventually("its maker ends", TIME_LIMIT, || rig.makers().is_empty());
    assert_eq!(started(&rig, "second"), "restore");
    assert_eq!(warnings(&rig), 0);

    let cold =
        rig.container("cold").annotation("io.vmctr.start", "cold").args(["/bin/sleep", "3600"]).detached();
    assert_eq!(start_of(&rig, cold.id()), "boot");
    cold.remove();

    let key = list[0]["key"].as_str().expect("a key");
    let table = run(rig.vmctr_command().args(["template", "ls"])).ok().text();
    assert!(table.lines().any(|line| line.starts_with(key) && line.contains("usable")), "{table}");
    run(rig.vmctr_command().args(["template", "rm", key])).ok();
    run(rig.vmctr_command().args(["template", "rm", key])).exits(127).fails_naming(&[key]);
    run(rig.vmctr_command().args(["template", "rm", "../run"])).exits(127).fails_naming(&["../run"]);
    assert_eq!(templates(&rig), [Value::Null; 0]);
    let bad = rig.container("bad").annotation("io.vmctr.start", "warm").args(["/bin/true"]);
    bad.output().fails_naming(&["io.vmctr.start", "warm"]);
}

/// Two VMs from one memory image agree on nothing that a program could take for its own.
#[test]
fn each_restored_vm_is_itself() {
    let rig = rig();
    create(&rig);
    let read = |container: &Container<'_>, script: &str| container.sh(script).ok().text();
    let (one, two) = (idle(&rig, "one"), idle(&rig, "two"));
    for container in [&one, &two] {
        assert_eq!(start_of(&rig, container.id()), "restore");
        // As soon as a process can ask.
        let seconds: u64 = read(container, "date +%s").trim().parse().expect("a number");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        assert!(now.abs_diff(seconds) <= 2, "the guest's clock says {seconds}, the host's {now}");
    }
    for script in [
        "cat /proc/sys/kernel/random/boot_id",
        "cat /proc/sys/kernel/random/uuid",
        "head -c 32 /dev/urandom | od -x",
        "head -c 32 /dev/random | od -x",
    ] {
        assert_ne!(read(&one, script), read(&two, script), "{script}");
    }
    // Time goes on, at the right pace.
    let uptime = |container: &Container<'_>| -> f64 {
        let text = read(container, "cat /proc/uptime");
        text.split(' ').next().and_then(|seconds| seconds.parse().ok()).expect("a number")
    };
    let (before, began) = (uptime(&one), std::time::Instant::now());
    sleep(Duration::from_secs(3));
    let (passed, real) = (uptime(&one) - before, began.elapsed().as_secs_f64());
    assert!((passed - real).abs() < 1.5, "{passed} s passed in the guest, {real} s on the host");

    two.sh("touch /tmp/two; hostname two || true").ok();
    one.sh("test ! -e /tmp/two").ok();
    let names = [&one, &two].map(|container| read(container, "hostname"));
    assert!(!names[0].contains("two"), "{names:?}");
    one.remove();
    two.remove();
}

#[test]
fn a_damaged_template_costs_one_warning_and_is_made_anew() {
    let rig = rig();
    let key = create(&rig);
    let harm = |file: &str| {
        let path = folder(&rig, &key).join(file);
        let part = File::options().write(true).open(path).expect("a part of the template");
        match file {
            "ram" => part.write_all_at(&[0xa5; 4096], 1 << 20).expect("writable"),
            _ => part.set_len(1000).expect("writable"),
        }
    };
    for (number, file) in (1..).zip(["ram", "state", "manifest"]) {
        harm(file);
        assert_eq!(started(&rig, &format!("after-{file}")), "boot");
        assert_eq!(warnings(&rig), number, "{}", rig.daemon().log());
        eventually("it is made anew", TIME_LIMIT, || {
            rig.makers().is_empty() && templates(&rig).first().is_some_and(|it| it["current"] == true)
        });
    }
    assert_eq!(started(&rig, "healed"), "restore");
    assert_eq!(warnings(&rig), 3);
}

/// A maker that is killed leaves no process, and what it had begun does not keep the next one away.
#[test]
fn a_killed_maker_is_replaced_by_the_next() {
    let rig = rig();
    assert_eq!(started(&rig, "first"), "boot");
    let running = || rig.makers().first().copied();
    eventually("a template is being made", TIME_LIMIT, || running().is_some());
    let maker = running().expect("just seen");
    let qemu = || proc::all().into_iter().find(|pid| proc::parent(*pid) == Some(maker));
    eventually("its QEMU runs", TIME_LIMIT, || qemu().is_some());
    let qemu = qemu().expect("just seen");
    signal(maker, Signal::SIGKILL);
    eventually("QEMU follows it", TIME_LIMIT, || !proc::is_alive(qemu));
    assert_eq!(templates(&rig), [Value::Null; 0]);
    assert_eq!(started(&rig, "second"), "boot");
    eventually("the template is made", TIME_LIMIT, || !templates(&rig).is_empty());
    eventually("its maker ends", TIME_LIMIT, || rig.makers().is_empty());
    assert_eq!(started(&rig, "third"), "restore");
}

/// A template directory that cannot hold one is no reason for a container not to run.
#[test]
fn without_room_containers_boot() {
    let rig = rig();
    let small = rig.new_folder("templates");
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("small"), &small, Some("tmpfs"), flags, Some("size=2m")).expect("root may mount");
    assert_eq!(started(&rig, "first"), "boot");
    eventually("its maker gives up", TIME_LIMIT, || rig.makers().is_empty());
    assert_eq!(started(&rig, "second"), "boot");
    assert!(rig.makers().is_empty(), "what has just failed is tried again");
    let said: Vec<_> = fs::read_dir(&small).expect("mounted").flatten().map(|entry| entry.path()).collect();
    let log = said.iter().find(|path| path.extension().is_some_and(|end| end == "log")).expect("a log");
    let log = fs::read_to_string(log).expect("readable");
    assert!(log.contains("No space left on device"), "{log}");
    nix::mount::umount2(&small, nix::mount::MntFlags::MNT_DETACH).expect("mounted");
}

#[test]
fn a_restored_vm_gives_memory_back() {
    memory_comes_back("restore");
}

#[test]
fn a_booted_vm_gives_memory_back() {
    memory_comes_back("boot");
}

fn memory_comes_back(start: &str) {
    const MIB: u64 = 1 << 20;
    let rig = rig();
    if start == "restore" {
        run(rig.vmctr_command().args(["template", "create", "--memory", "768MiB"])).ok();
    }
    let run = rig.container("burst").annotation("io.vmctr.memory", "768MiB");
    let container = run.args(["/bin/sleep", "3600"]).detached();
    assert_eq!(start_of(&rig, container.id()), start);
    let qemu = Vm::of(&rig, container.id()).qemu;
    let used = || proc::rollup(qemu, "Rss:").expect("QEMU runs");
    let before = used();
    // dd fills its buffer, then waits for a reader.
    container.sh("dd if=/dev/zero bs=200M count=1 2>/dev/null | sleep 5").ok();
    let peak = used();
    assert!(peak > before + 180 * MIB, "{} MiB before, {} MiB after the burst", before / MIB, peak / MIB);
    eventually("the host has its memory back", Duration::from_secs(10), || used() < peak - 150 * MIB);
    container.sh("echo still works").ok().prints("still works");
    container.remove();
}
