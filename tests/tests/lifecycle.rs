//! What can be done to a container while it runs: further processes, signals, pausing, looking, changing limits.

use std::time::{Duration, SystemTime};

use serde_json::json;
use vmctr_tests::rig::command::{Running, eventually};
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::image::USER;
use vmctr_tests::rig::{Rig, api};
use vmctr_tests::under_both_runtimes;

under_both_runtimes! {
    a_further_process_has_its_own_output_exit_code_user_and_folder,
    further_processes_run_side_by_side,
    a_further_process_can_be_killed_alone,
    a_signal_reaches_the_first_process,
    a_killed_container_exits_with_137,
    a_kill_of_all_reaches_every_process,
    the_end_of_the_first_process_ends_all_others,
    a_paused_container_stands_still_until_resumed,
    its_processes_are_listed,
    its_figures_can_be_read,
    its_limits_can_be_changed,
    a_running_container_is_not_deleted_unless_forced,
    exit_times_are_the_ends_own,
    an_id_can_be_used_again,
    a_container_can_be_created_first_and_started_later,
}

fn idle<'rig>(rig: &'rig Rig, name: &str) -> Container<'rig> {
    rig.container(name).args(["/bin/sleep", "3600"]).detached()
}

/// Its first process notes each TERM in a file, which it can do only while it runs.
fn trapping<'rig>(rig: &'rig Rig, name: &str, on_term: &str) -> Container<'rig> {
    let script = format!("trap '{on_term}' TERM; touch /ready; while :; do sleep 0.1; done");
    let container = rig.container(name).sh(&script).detached();
    eventually("the script waits", Duration::from_secs(30), || container.sh("test -e /ready").code() == 0);
    container
}

fn a_further_process_has_its_own_output_exit_code_user_and_folder(rig: &mut Rig) {
    let container = idle(rig, "base");
    container.sh("echo out; echo err >&2; exit 9").exits(9).prints("out");
    let (name, uid) = USER;
    let flags = ["--cwd", "/var/tmp", "--user", &format!("{uid}:{uid}")];
    let output = container.exec("user", &flags, &["/bin/sh", "-c", "pwd; id -un; echo $FROM_IMAGE"]);
    output.ok().prints(&format!("/var/tmp\n{name}\nyes"));
    container.exec("none", &[], &["/no/such/program"]).fails_naming(&["/no/such/program"]);
    container.sh("echo still here").ok().prints("still here");
    container.remove();
}

fn further_processes_run_side_by_side(rig: &mut Rig) {
    let container = idle(rig, "base");
    let start = |number: usize| {
        let script = format!("sleep 1; echo {number}; exit {number}");
        Running::start(&mut container.exec_command(&format!("e{number}"), &[], &["/bin/sh", "-c", &script]))
    };
    let running: Vec<_> = (1..=5).map(start).collect();
    for (number, output) in (1..=5).zip(running) {
        output.finish().exits(number).prints(&number.to_string());
    }
    container.remove();
}

fn a_further_process_can_be_killed_alone(rig: &mut Rig) {
    let container = idle(rig, "base");
    let exec = Running::start(&mut container.exec_command("long", &[], &["/bin/sleep", "3600"]));
    let flags = ["--exec-id", "long", "--signal", "SIGKILL"];
    eventually("the process can be killed", Duration::from_secs(30), || {
        container.task("kill", &flags).code() == 0
    });
    exec.finish().exits(137);
    container.sh("echo still here").ok().prints("still here");
    container.remove();
}

fn a_signal_reaches_the_first_process(rig: &mut Rig) {
    let container = trapping(rig, "trap", "exit 42");
    container.kill("SIGTERM").ok();
    container.wait_for("STOPPED");
    assert_eq!(container.delete(), 42);
}

fn a_killed_container_exits_with_137(rig: &mut Rig) {
    let (container, running) = rig.container("sleep").args(["/bin/sleep", "3600"]).start();
    container.kill("SIGKILL").ok();
    running.finish().exits(137);
}

fn a_kill_of_all_reaches_every_process(rig: &mut Rig) {
    let script = "(trap 'touch /child; exit' TERM; touch /ready; while :; do sleep 0.1; done) & \
                  trap 'touch /parent' TERM; while :; do sleep 0.1; done";
    let container = rig.container("family").sh(script).detached();
    eventually("the child waits", Duration::from_secs(30), || container.sh("test -e /ready").code() == 0);
    container.task("kill", &["--all", "--signal", "SIGTERM"]).ok();
    eventually("both got it", Duration::from_secs(30), || {
        container.sh("test -e /child -a -e /parent").code() == 0
    });
    container.remove();
}

fn the_end_of_the_first_process_ends_all_others(rig: &mut Rig) {
    let container = trapping(rig, "first", "exit 3");
    let exec = Running::start(&mut container.exec_command("long", &[], &["/bin/sleep", "3600"]));
    eventually("both run", Duration::from_secs(30), || {
        container.sh("ps | grep -q 'sleep 360[0]'").code() == 0
    });
    container.kill("SIGTERM").ok();
    exec.finish().exits(137);
    container.wait_for("STOPPED");
    assert_eq!(container.delete(), 3);
}

fn a_paused_container_stands_still_until_resumed(rig: &mut Rig) {
    let folder = rig.new_folder("shared");
    let script =
        "i=0; while :; do i=$((i+1)); echo $i > /shared/new; mv /shared/new /shared/count; sleep 0.05; done";
    let container = rig.container("count").bind(&folder, "/shared", "rbind:rw").sh(script).detached();
    let count = || std::fs::read_to_string(folder.join("count")).unwrap_or_default();
    eventually("it counts", Duration::from_secs(30), || !count().is_empty());
    container.task("pause", &[]).ok();
    assert_eq!(container.status().as_deref(), Some("PAUSED"));
    let before = count();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(before, count(), "it counted while it was paused");
    container.task("resume", &[]).ok();
    eventually("it counts again", Duration::from_secs(30), || count() != before);
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    container.remove();
}

fn its_processes_are_listed(rig: &mut Rig) {
    let container = rig.container("three").sh("sleep 3600 & sleep 3600 & wait").detached();
    eventually("three processes are listed", Duration::from_secs(30), || {
        let list = container.task("ps", &[]).ok().text();
        let pids =
            list.lines().skip(1).filter_map(|line| line.split_whitespace().next()?.parse::<u32>().ok());
        pids.filter(|pid| *pid > 0).count() == 3
    });
    container.remove();
}

fn its_figures_can_be_read(rig: &mut Rig) {
    let script = "dd if=/dev/urandom of=/dev/shm/f bs=1M count=16 2>/dev/null; touch /ready; sleep 3600";
    let container = rig.container("busy").sh(script).detached();
    eventually("16 MiB are written", Duration::from_secs(60), || container.sh("test -e /ready").code() == 0);
    let figures = container.task("metrics", &["--format", "json"]).ok().json();
    // cgroup v1 under runc on such a host, v2 else.
    let memory = [&figures["memory"]["usage"]["usage"], &figures["memory"]["usage"]];
    let memory = memory.iter().find_map(|value| value.as_u64()).expect("memory usage");
    assert!((16 << 20..512 << 20).contains(&memory), "memory usage {memory}");
    let pids = figures["pids"]["current"].as_u64().expect("process count");
    assert!((1..20).contains(&pids), "{pids} processes");
    let cpu = [&figures["cpu"]["usage"]["total"], &figures["cpu"]["usage_usec"]];
    assert!(cpu.iter().find_map(|value| value.as_u64()).expect("CPU time") > 1000, "{figures}");
    container.remove();
}

fn its_limits_can_be_changed(rig: &mut Rig) {
    let container = idle(rig, "base");
    api::update(rig, container.id(), &json!({"pids": {"limit": 77}})).expect("the limit can be changed");
    let figures = container.task("metrics", &["--format", "json"]).ok().json();
    assert_eq!(figures["pids"]["limit"], 77);
    container.remove();
}

fn a_running_container_is_not_deleted_unless_forced(rig: &mut Rig) {
    let container = idle(rig, "base");
    container.task("delete", &[]).fails_naming(&[container.id()]);
    container.sh("echo still here").ok().prints("still here");
    container.task("delete", &["--force"]).ok();
    assert_eq!(container.status(), None);
    container.forget();
}

fn exit_times_are_the_ends_own(rig: &mut Rig) {
    let container = rig.container("short").sh("exit 8").detached();
    container.wait_for("STOPPED");
    let now = || {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs().cast_signed()
    };
    let stopped = now();
    std::thread::sleep(Duration::from_secs(3));
    let (code, time) = api::delete(rig, container.id()).expect("it has stopped");
    assert_eq!(code, 8);
    assert!((stopped - 60..=stopped).contains(&time), "exit time {time}, seen stopped at {stopped}");
    container.forget();
}

fn an_id_can_be_used_again(rig: &mut Rig) {
    let id = rig.container("again").id().to_owned();
    for round in ["first", "second"] {
        let run = rig.container("again").args(["/bin/echo", round]);
        assert_eq!(run.id(), id);
        run.output().ok().prints(round);
    }
}

fn a_container_can_be_created_first_and_started_later(rig: &mut Rig) {
    let run = rig.container("later").args(["/bin/echo", "hello"]);
    run.create().ok();
    rig.ctr_run(&["task", "start", run.id()]).ok().prints("hello");
    rig.ctr_run(&["container", "delete", run.id()]).ok();
}
