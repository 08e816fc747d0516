//! Limits of a container and the size of its VM.

use std::fs;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::eventually;
use vmctr_tests::under_both_runtimes;

under_both_runtimes! {
    a_process_over_the_memory_limit_is_killed,
    no_more_processes_run_than_the_limit_allows,
    a_cpu_quota_is_set,
}

fn a_process_over_the_memory_limit_is_killed(rig: &mut Rig) {
    let run = rig.container("hungry").flag("--memory-limit", (64 << 20).to_string());
    run.args(["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"]).output().exits(137);
}

fn no_more_processes_run_than_the_limit_allows(rig: &mut Rig) {
    let run = rig.container_by_spec("bomb", |spec| {
        spec["linux"]["resources"]["pids"] = json!({"limit": 30});
        let script = "i=0; while test $i -lt 60; do sleep 3600 & i=$((i+1)); done";
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
    });
    run.output().fails_naming(&["fork"]);
}

fn a_cpu_quota_is_set(rig: &mut Rig) {
    let container = rig.container("quota").flag("--cpus", "0.5").args(["/bin/sleep", "3600"]).detached();
    let busy = "i=0; while test $i -lt 300000; do i=$((i+1)); done";
    let throttled = |figures: &Value| {
        let periods = [&figures["cpu"]["throttling"]["throttled_periods"], &figures["cpu"]["nr_throttled"]];
        periods.iter().find_map(|value| value.as_u64()).unwrap_or_default()
    };
    container.sh(busy).ok();
    eventually("the container was slowed down", Duration::from_secs(60), || {
        throttled(&container.task("metrics", &["--format", "json"]).ok().json()) > 0
    });
    container.remove();
}

#[test]
fn the_vm_has_the_size_asked_for() {
    let rig = Rig::vmctr();
    let run = rig.container("size").annotation("io.vmctr.memory", "320MiB").annotation("io.vmctr.vcpus", 2);
    let output = run.sh("nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").output().ok();
    let text = output.text();
    let (cpus, memory) = text.split_once('\n').expect("two lines");
    assert_eq!(cpus, "2");
    let memory: u32 = memory.trim().parse().expect("a number");
    assert!((200..320).contains(&memory), "{memory} MiB");
}

#[test]
fn the_vm_is_as_large_as_its_containers_limits() {
    let rig = Rig::vmctr();
    let run = rig.container("limits").flag("--memory-limit", (200 << 20).to_string()).flag("--cpus", "1.5");
    let container = run.args(["/bin/sleep", "3600"]).detached();
    let view = rig.inspect(container.id());
    assert_eq!(view["vcpus"], 2);
    assert_eq!(view["memory_bytes"], (200_u64 + 128) << 20);
    container.remove();
}

#[test]
fn a_full_host_disk_is_seen_in_the_container_and_harms_nothing_else() {
    let rig = Rig::vmctr();
    let root = rig.busybox_root("root", &[]);
    let disk = rig.new_folder("disk");
    mount(Some("disk"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=16m")).expect("tmpfs");
    let upper = disk.join("upper");
    fs::create_dir(&upper).expect("the disk is empty");
    let script = "dd if=/dev/zero of=/big bs=1M count=64; rm /big; echo again > /small; cat /small";
    let run = rig.container_in(&root, "full").annotation("io.vmctr.upper-dir", upper.display()).sh(script);
    let output = run.output().ok().prints("again");
    assert!(output.errors().contains("No space left on device"), "{output}");
    assert_eq!(fs::read_to_string(upper.join("small")).expect("written"), "again\n");
    umount2(&disk, MntFlags::empty()).expect("nothing uses the disk any more");
}
