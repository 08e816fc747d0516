//! Containers that take a VM from the pool, and what happens when the pool or its VMs end.

use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmctr_tests::rig::command::{Running, TIME_LIMIT, eventually, run};
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::vm::{Vm, signal};
use vmctr_tests::rig::{Rig, proc};

fn rig(size: u32) -> Rig {
    Rig::vmctr_with(&format!("[vm]\nstart = \"pool\"\n[pool]\nsize = {size}\n"))
}

/// `vmctr pool run`; dropping it kills it.
fn pool(rig: &Rig) -> Running {
    Running::start(rig.vmctr_command().args(["pool", "run"]).stdin(Stdio::null()))
}

fn list(rig: &Rig) -> Vec<Value> {
    let list = run(rig.vmctr_command().args(["pool", "ls", "--json"]));
    if list.code() == 0 { list.json().as_array().expect("a list").clone() } else { vec![] }
}

fn number(value: &Value) -> u32 {
    value.as_u64().and_then(|number| number.try_into().ok()).unwrap_or_else(|| panic!("{value} is no number"))
}

/// QEMU's process IDs of the VMs that wait.
fn waiting(rig: &Rig) -> Vec<u32> {
    list(rig)
        .iter()
        .filter(|member| !member["qemu"].is_null())
        .map(|member| number(&member["qemu"]))
        .collect()
}

fn filled(rig: &Rig, size: usize) -> Vec<u32> {
    eventually("the pool is filled", TIME_LIMIT, || waiting(rig).len() == size);
    waiting(rig)
}

fn idle<'rig>(rig: &'rig Rig, name: &str) -> Container<'rig> {
    rig.container(name).args(["/bin/sleep", "3600"]).detached()
}

fn is_from_pool(rig: &Rig, id: &str) -> bool {
    let view = rig.inspect(id);
    view["phases"].as_array().is_some_and(|phases| phases.iter().any(|phase| phase["name"] == "take"))
}

#[test]
fn a_container_takes_the_vm_that_waits_and_another_replaces_it() {
    let rig = rig(1);
    let pool = pool(&rig);
    let first = filled(&rig, 1);
    let one = idle(&rig, "one");
    assert_eq!(Vm::of(&rig, one.id()).qemu, first[0]);
    assert!(is_from_pool(&rig, one.id()));
    one.sh("echo works; touch /kept").ok().prints("works");
    let second = filled(&rig, 1);
    assert_ne!(first, second);
    // A clock that stood still while the VM waited would be late by now.
    sleep(Duration::from_secs(4));
    let two = idle(&rig, "two");
    assert_eq!(Vm::of(&rig, two.id()).qemu, second[0]);

    // They have memory in common, and nothing else.
    let read = |container: &Container<'_>, script: &str| container.sh(script).ok().text();
    for script in ["cat /proc/sys/kernel/random/boot_id", "head -c 32 /dev/urandom | od -x"] {
        assert_ne!(read(&one, script), read(&two, script), "{script}");
    }
    two.sh("test ! -e /kept").ok();
    let seconds: u64 = read(&two, "date +%s").trim().parse().expect("a number");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    assert!(now.abs_diff(seconds) <= 2, "the guest's clock says {seconds}, the host's {now}");
    one.remove();
    two.remove();
    drop(pool);
}

#[test]
fn when_the_pool_is_killed_vms_that_wait_end_and_those_taken_live_on() {
    let rig = rig(1);
    let killed = pool(&rig);
    filled(&rig, 1);
    let taken = idle(&rig, "taken");
    let next = filled(&rig, 1)[0];
    drop(killed);
    eventually("the VM that waited ends", TIME_LIMIT, || !proc::is_alive(next));
    taken.sh("echo lives").ok().prints("lives");

    // Without a pool there is still the template.
    let other = idle(&rig, "other");
    assert!(!is_from_pool(&rig, other.id()));
    other.remove();

    let again = pool(&rig);
    filled(&rig, 1);
    let third = idle(&rig, "third");
    assert!(is_from_pool(&rig, third.id()));
    third.remove();
    taken.remove();
    drop(again);
}

/// Neither the pool nor a member answers; what they are asked for they see when nobody wants it any more.
#[test]
fn a_pool_that_hangs_holds_no_container_up_and_gives_no_vm_away_for_nothing() {
    let rig = rig(1);
    let pool = pool(&rig);
    let waits = filled(&rig, 1);
    signal(pool.pid(), Signal::SIGSTOP);
    let one = idle(&rig, "one");
    assert!(!is_from_pool(&rig, one.id()));
    one.remove();
    signal(pool.pid(), Signal::SIGCONT);
    assert_eq!(filled(&rig, 1), waits, "the VM was given to a container that has gone");

    let member = number(&list(&rig)[0]["pid"]);
    signal(member, Signal::SIGSTOP);
    let two = idle(&rig, "two");
    assert!(!is_from_pool(&rig, two.id()));
    two.remove();
    signal(member, Signal::SIGCONT);
    eventually("the member that was late ends", TIME_LIMIT, || !proc::is_alive(member));
    filled(&rig, 1);
    let three = idle(&rig, "three");
    assert!(is_from_pool(&rig, three.id()));
    three.remove();
    drop(pool);
}

#[test]
fn members_of_a_new_pool_wait_for_one_template() {
    let rig = rig(2);
    let mut command = rig.vmctr_command();
    let log = rig.folder().join("pool.log");
    command.args(["pool", "run"]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut pool = command.stderr(std::fs::File::create(&log).expect("writable")).spawn().expect("it starts");
    filled(&rig, 2);
    assert_eq!(std::fs::read_to_string(&log).expect("readable"), "");
    pool.kill().expect("it runs");
    pool.wait().expect("it was killed");
}

#[test]
fn a_vm_that_dies_while_it_waits_is_replaced_and_reported() {
    let rig = rig(1);
    let mut command = rig.vmctr_command();
    let log = rig.folder().join("pool.log");
    command.args(["pool", "run"]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut pool = command.stderr(std::fs::File::create(&log).expect("writable")).spawn().expect("it starts");
    let first = filled(&rig, 1)[0];
    signal(first, Signal::SIGKILL);
    eventually("it is replaced", TIME_LIMIT, || waiting(&rig).first().is_some_and(|qemu| *qemu != first));
    let said = std::fs::read_to_string(&log).expect("readable");
    assert!(said.contains("a waiting VM has ended"), "{said}");
    let container = idle(&rig, "after");
    assert!(is_from_pool(&rig, container.id()));
    container.remove();
    pool.kill().expect("it runs");
    pool.wait().expect("it was killed");
}

#[test]
fn containers_that_want_something_else_or_come_too_many_get_a_vm_all_the_same() {
    let rig = rig(1);
    let pool = pool(&rig);
    let waits = filled(&rig, 1);
    let larger =
        rig.container("larger").annotation("io.vmctr.memory", "640MiB").annotation("io.vmctr.start", "cold");
    let larger = larger.args(["/bin/sleep", "3600"]).detached();
    assert!(!is_from_pool(&rig, larger.id()));
    assert_eq!(waiting(&rig), waits, "it took the VM and threw it away");
    larger.remove();
    let both = [idle(&rig, "a"), idle(&rig, "b")];
    assert!(is_from_pool(&rig, both[0].id()));
    for container in both {
        container.sh("echo works").ok().prints("works");
        container.remove();
    }
    drop(pool);
}

#[test]
fn a_pool_that_cannot_be_says_why() {
    let rig = rig(1);
    run(rig.vmctr_command().args(["pool", "ls"])).exits(127).fails_naming(&["No pool runs"]);
    let pool = pool(&rig);
    filled(&rig, 1);
    run(rig.vmctr_command().args(["pool", "run"])).exits(125).fails_naming(&["Another pool runs"]);
    // Shims find the same socket, but were told something else.
    let file = rig.folder().join("vmctr.toml");
    let text = std::fs::read_to_string(&file).expect("readable");
    std::fs::write(&file, text.replace("size = 1", "size = 2")).expect("writable");
    let container = idle(&rig, "stranger");
    assert!(!is_from_pool(&rig, container.id()));
    container.remove();
    eventually("the log says why", Duration::from_secs(5), || {
        rig.daemon().log().contains("it was started with another configuration")
    });
    std::fs::write(&file, "[pool]\nsize = 0\n").expect("writable");
    run(rig.vmctr_command().args(["pool", "run"])).exits(125).fails_naming(&["pool.size"]);
    std::fs::write(&file, "[pool]\nsize = 2\nmemory = \"500MiB\"\n").expect("writable");
    let named = ["pool.memory is 500MiB", "512MiB"];
    run(rig.vmctr_command().args(["pool", "run"])).exits(125).fails_naming(&named);
    drop(pool);
}
