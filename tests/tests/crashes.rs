//! When a part of a running VM dies, hangs or is overwhelmed: the container ends with the right event, or
//! lives on, and nothing is left.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::eventually;
use vmctr_tests::rig::container::{Container, Run};
use vmctr_tests::rig::events::Events;
use vmctr_tests::rig::vm::{Vm, signal};

/// How soon containerd must know that a VM is gone.
const SOON: Duration = Duration::from_secs(30);

fn idle(run: Run<'_>) -> Container<'_> {
    run.args(["/bin/sleep", "3600"]).detached()
}

/// The task has stopped, told so once, its VM is gone, and it can be deleted.
#[track_caller]
fn assert_ended(container: Container<'_>, events: &Events, vm: &Vm) -> u32 {
    eventually("the task is stopped", SOON, || container.status().as_deref() == Some("STOPPED"));
    let (id, exits) = (container.id().to_owned(), || own_exits(events, container.id()));
    eventually("the exit is told", SOON, || !exits().is_empty());
    let exits = exits();
    let status = container.delete();
    assert_eq!(exits, [u64::from(status)]);
    assert_eq!(own_exits(events, &id).len(), 1, "its exit was told twice");
    eventually("the VM is gone", SOON, || !vm.is_alive());
    status
}

/// Exit codes told of the container's first process.
fn own_exits(events: &Events, id: &str) -> Vec<u64> {
    let exits =
        events.of(id).into_iter().filter(|event| event.topic == "/tasks/exit" && event.fields["id"] == id);
    exits.map(|event| event.fields["exit_status"].as_u64().unwrap_or_default()).collect()
}

#[test]
fn when_qemu_is_killed_the_container_has_exited() {
    let rig = Rig::vmctr();
    let events = Events::record(&rig);
    let container = idle(rig.container("idle"));
    let vm = Vm::of(&rig, container.id());
    signal(vm.qemu, Signal::SIGKILL);
    assert_ne!(assert_ended(container, &events, &vm), 0);
}

#[test]
fn when_qemu_is_killed_a_client_in_the_foreground_returns() {
    let rig = Rig::vmctr();
    let (container, running) = rig.container("cat").args(["/bin/cat"]).start();
    signal(Vm::of(&rig, container.id()).qemu, Signal::SIGKILL);
    let output = running.finish_within(SOON);
    assert_ne!(output.code(), 0, "{output}");
}

#[test]
fn when_the_share_daemon_is_killed_the_container_has_exited() {
    let rig = Rig::vmctr();
    let events = Events::record(&rig);
    let container = idle(rig.container("idle"));
    let vm = Vm::of(&rig, container.id());
    signal(vm.fsd, Signal::SIGKILL);
    assert_ne!(assert_ended(container, &events, &vm), 0);
}

#[test]
fn when_the_guests_kernel_panics_the_container_has_exited() {
    let rig = Rig::vmctr();
    let events = Events::record(&rig);
    let run = rig.container_by_spec("panic", |spec| {
        let script = "while ! test -e /go; do sleep 0.1; done; echo c > /proc/sysrq-trigger";
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
        spec["linux"]["readonlyPaths"] = json!([]);
    });
    let container = run.detached();
    let vm = Vm::of(&rig, container.id());
    // Its own end may come too late to be told.
    let _told = container.sh("touch /go");
    assert_ne!(assert_ended(container, &events, &vm), 0);
}

#[test]
fn when_the_guest_runs_out_of_memory_the_guest_lives_on() {
    let rig = Rig::vmctr();
    let run = rig.container("full").annotation("io.vmctr.memory", "256MiB");
    let container = idle(run);
    // The file alone takes what the guest has; then either the file system or a process is refused memory.
    let hog = "dd if=/dev/zero of=/dev/shm/f bs=1M count=300; \
               for i in 1 2 3; do dd if=/dev/zero of=/dev/null bs=60M count=20 & done; wait";
    container.exec("hog", &[], &["/bin/sh", "-c", hog]);
    container.sh("rm -f /dev/shm/f; echo still here").ok().prints("still here");
    container.remove();
}

#[test]
fn when_the_shim_is_killed_containerd_cleans_up() {
    let rig = Rig::vmctr();
    let events = Events::record(&rig);
    let container = idle(rig.container("idle"));
    let vm = Vm::of(&rig, container.id());
    signal(vm.shim, Signal::SIGKILL);
    eventually("the VM is gone", SOON, || !vm.is_alive());
    events.wait(container.id(), "/tasks/exit");
    eventually("the task is gone", SOON, || container.status().is_none());
    container.forget();
}

#[test]
fn when_containerd_restarts_the_container_runs_on() {
    let mut rig = Rig::vmctr();
    let id = idle(rig.container("idle")).id().to_owned();
    let before = Vm::of(&rig, &id);
    rig.restart_containerd();
    let container = rig.existing(&id);
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    assert_eq!(Vm::of(&rig, &id).qemu, before.qemu);
    container.sh("echo still here").ok().prints("still here");
    container.kill("SIGKILL").ok();
    container.wait_for("STOPPED");
    assert_eq!(container.delete(), 137);
}

#[test]
fn an_exit_while_containerd_is_down_is_not_lost() {
    let mut rig = Rig::vmctr();
    let container =
        rig.container("short").sh("while ! test -e /go; do sleep 0.1; done; sleep 2; exit 6").detached();
    let id = container.id().to_owned();
    // Its own end may come too late to be told.
    let _told = container.sh("touch /go");
    rig.stop_containerd();
    std::thread::sleep(Duration::from_secs(5));
    rig.restart_containerd();
    let container = rig.existing(&id);
    container.wait_for("STOPPED");
    assert_eq!(container.delete(), 6);
}

#[test]
fn a_vm_that_hangs_can_still_be_removed() {
    let rig = Rig::vmctr();
    let container = idle(rig.container("idle"));
    let vm = Vm::of(&rig, container.id());
    signal(vm.qemu, Signal::SIGSTOP);
    container.task("kill", &["--signal", "SIGKILL"]);
    container.remove();
    eventually("the VM is gone", SOON, || !vm.is_alive());
}

#[test]
fn a_container_that_forks_without_end_can_be_killed() {
    let rig = Rig::vmctr();
    let bomb = "touch /ready; b() { b | b & }; b; sleep 3600";
    let container = rig.container("bomb").sh(bomb).detached();
    std::thread::sleep(Duration::from_secs(5));
    container.kill("SIGKILL").ok();
    container.wait_for("STOPPED");
    assert_eq!(container.delete(), 137);
}
