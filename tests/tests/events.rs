//! What containerd is told about a container: every event, once, in the order in which it happened.

use std::time::Duration;

use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::eventually;
use vmctr_tests::rig::events::Events;
use vmctr_tests::under_both_runtimes;

under_both_runtimes! {
    a_short_container_is_created_started_exits_and_is_deleted,
    a_further_process_is_added_started_and_exits,
    a_pause_and_a_resume_are_told,
    an_out_of_memory_kill_is_told,
}

fn a_short_container_is_created_started_exits_and_is_deleted(rig: &mut Rig) {
    let events = Events::record(rig);
    let run = rig.container("short").sh("exit 7");
    let id = run.id().to_owned();
    run.output().exits(7);
    events.wait(&id, "/tasks/delete");
    let order = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    assert_eq!(events.topics(&id), order);
    let exit = events.wait(&id, "/tasks/exit").fields;
    assert_eq!((exit["id"].as_str(), exit["exit_status"].as_u64()), (Some(id.as_str()), Some(7)), "{exit}");
    let start = events.wait(&id, "/tasks/start").fields;
    assert_eq!(start["pid"], exit["pid"], "one process, two IDs: {start} {exit}");
    assert!(start["pid"].as_u64().is_some_and(|pid| pid > 0), "{start}");
}

fn a_further_process_is_added_started_and_exits(rig: &mut Rig) {
    let events = Events::record(rig);
    let container = rig.container("base").args(["/bin/sleep", "3600"]).detached();
    let id = container.id().to_owned();
    container.exec("more", &[], &["/bin/sh", "-c", "exit 4"]).exits(4);
    events.wait(&id, "/tasks/exit");
    let order = ["/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"];
    assert_eq!(events.topics(&id), order);
    let exit = events.wait(&id, "/tasks/exit").fields;
    assert_eq!((exit["id"].as_str(), exit["exit_status"].as_u64()), (Some("more"), Some(4)), "{exit}");
    container.remove();
}

fn a_pause_and_a_resume_are_told(rig: &mut Rig) {
    let events = Events::record(rig);
    let container = rig.container("base").args(["/bin/sleep", "3600"]).detached();
    let id = container.id().to_owned();
    container.task("pause", &[]).ok();
    container.task("resume", &[]).ok();
    events.wait(&id, "/tasks/resumed");
    let order = ["/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed"];
    assert_eq!(events.topics(&id), order);
    container.remove();
}

fn an_out_of_memory_kill_is_told(rig: &mut Rig) {
    let events = Events::record(rig);
    let script = "dd if=/dev/zero of=/dev/null bs=100M count=1; sleep 3600";
    let run = rig.container("hungry").flag("--memory-limit", (64 << 20).to_string()).sh(script);
    let container = run.detached();
    events.wait(container.id(), "/tasks/oom");
    eventually("the container lives on", Duration::from_secs(30), || container.sh("true").code() == 0);
    container.remove();
}
