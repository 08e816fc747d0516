//! What is different from other runtimes: each container has a kernel of its own, and `vmctr` shows the VM.

use vmctr_tests::rig::command::run;
use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::vm::Vm;
use vmctr_tests::rig::{Rig, prerequisites, proc};

fn idle<'rig>(rig: &'rig Rig, name: &str) -> Container<'rig> {
    rig.container(name).args(["/bin/sleep", "3600"]).detached()
}

#[test]
fn the_container_runs_under_the_guests_kernel() {
    let rig = Rig::vmctr();
    let manifest =
        std::fs::read_to_string(prerequisites::guest_dir().join("manifest.json")).expect("readable");
    let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("JSON");
    let release = manifest["kernel_release"].as_str().expect("a string");
    rig.container("kernel").args(["/bin/uname", "-r"]).output().ok().prints(release);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("readable");
    assert_ne!(host.trim(), release, "this host runs the guest's kernel: the case proves nothing");
}

#[test]
fn two_containers_do_not_see_each_other() {
    let rig = Rig::vmctr();
    let (one, two) = (idle(&rig, "one"), idle(&rig, "two"));
    let (vm_one, vm_two) = (Vm::of(&rig, one.id()), Vm::of(&rig, two.id()));
    assert!(vm_one.qemu != vm_two.qemu && vm_one.shim != vm_two.shim);
    assert_ne!(proc::status_field(vm_one.qemu, "Uid"), proc::status_field(vm_two.qemu, "Uid"));
    let boot_id = |container: &Container<'_>| container.sh("cat /proc/sys/kernel/random/boot_id").ok().text();
    assert_ne!(boot_id(&one), boot_id(&two));
    one.sh("touch /mine").ok();
    two.sh("test ! -e /mine").ok();
    one.remove();
    two.sh("echo still here").ok().prints("still here");
    two.remove();
}

#[test]
fn a_real_distribution_runs() {
    let rig = Rig::vmctr();
    let images = rig.import(&prerequisites::debian_image());
    let debian = images.iter().find(|image| !image.contains("busybox")).expect("an image in the archive");
    let script = ". /etc/os-release; echo $ID; dpkg --version | grep -c Debian; perl -e 'print 6*7, \"\\n\"'; \
                  chroot --userspec=1001:1001 / sh -c 'id -u; touch /tmp/f; stat -c %u /tmp/f'; \
                  dpkg-divert --no-rename --add /bin/x > /dev/null && dpkg-divert --list | grep -c 'local diversion of /bin/x '";
    let output = rig.container_of(debian, "debian").sh(script).output();
    output.ok().prints("debian\n1\n42\n1001\n1001\n1");
}

#[test]
fn vmctr_lists_and_shows_the_vm() {
    let rig = Rig::vmctr();
    let container = idle(&rig, "shown");
    let vm = Vm::of(&rig, container.id());
    let list = run(rig.vmctr_command().args(["--json", "ps"])).ok().json();
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    assert_eq!(list[0]["container"], container.id());
    assert_eq!(
        (list[0]["state"].as_str(), list[0]["qemu_pid"].as_u64()),
        (Some("running"), Some(vm.qemu.into()))
    );
    let table = run(rig.vmctr_command().arg("ps")).ok().text();
    assert!(
        table.lines().nth(1).is_some_and(|row| row.starts_with(container.id()) && row.contains("512 MiB")),
        "{table}"
    );
    let view = rig.inspect(container.id());
    assert_eq!(view["state"], "Running");
    let shares: Vec<_> = view["shares"].as_array().expect("a list").iter().collect();
    assert!(shares.iter().any(|share| share["name"] == "lower/0" && share["read_only"] == true), "{view}");
    assert!(view["phases"].as_array().is_some_and(|phases| phases.len() > 3), "{view}");
    container.task("pause", &[]).ok();
    assert_eq!(rig.inspect(container.id())["tasks"][0]["state"], "paused");
    let text = run(rig.vmctr_command().args(["inspect", container.id()])).ok().text();
    assert!(text.contains("lower/0") && text.contains("qemu"), "{text}");
    container.remove();
    assert_eq!(run(rig.vmctr_command().args(["--json", "ps"])).ok().json(), serde_json::json!([]));
}

#[test]
fn vmctrs_exit_codes_say_what_is_wrong() {
    let rig = Rig::vmctr();
    run(rig.vmctr_command().args(["inspect", "nobody"])).exits(127).fails_naming(&["nobody", "default"]);
    run(rig.vmctr_command().arg("frobnicate")).exits(125).fails_naming(&["frobnicate"]);
    run(rig.vmctr_command().args(["guest", "info", "/no/such/guest"]))
        .exits(127)
        .fails_naming(&["/no/such/guest"]);
    run(rig.vmctr_command().args(["guest", "info"])).ok();
    let version = run(rig.vmctr_command().args(["--json", "version"])).ok().json();
    assert!(version["containerd"].as_str().is_some(), "{version}");
}

#[test]
fn the_doctor_finds_this_host_healthy_and_says_what_is_wrong_elsewhere() {
    let rig = Rig::vmctr();
    let healthy = run(rig.vmctr_command().args(["doctor", "--json"])).ok().json();
    let checks = healthy.as_array().expect("a list");
    assert!(checks.iter().all(|check| check["status"] != "fail"), "{healthy}");
    let ill = run(rig.vmctr_command().env("VMCTR_GUEST_DIR", "/no/such/guest").args([
        "--address",
        "/no/socket",
        "doctor",
    ]));
    let text = ill.exits(1).text();
    for finding in ["/no/such/guest", "vmctr guest build", "/no/socket", "QEMU", "ok"] {
        assert!(text.contains(finding), "{finding} is missing in:\n{text}");
    }
}
