//! `ctr run`: what the container's first process gets, and what of it comes back.

use serde_json::json;
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::image::{MARKER, USER};
use vmctr_tests::under_both_runtimes;

under_both_runtimes! {
    output_and_exit_code_come_back,
    arguments_arrive_unchanged,
    environment_and_working_directory_are_those_asked_for,
    user_groups_umask_and_hostname_are_those_of_the_specification,
    limits_capabilities_and_no_new_privileges_hold,
    sysctls_and_tmpfs_are_those_of_the_specification,
    no_signal_is_blocked_or_ignored,
    a_seccomp_filter_holds,
    masked_and_read_only_paths_hold,
    a_program_that_does_not_exist_is_named,
    the_root_is_the_images_and_can_be_written,
    a_read_only_root_cannot_be_written,
    the_other_names_of_a_file_go_on_when_one_is_removed,
    devices_and_kernel_file_systems_are_there,
}

fn output_and_exit_code_come_back(rig: &mut Rig) {
    let script = "echo to stdout; echo to stderr >&2; exit 7";
    let output = rig.container("seven").sh(script).output().exits(7).prints("to stdout");
    assert_eq!(output.errors(), "to stderr\n");
    rig.container("zero").sh("true").output().ok().prints("");
}

fn arguments_arrive_unchanged(rig: &mut Rig) {
    let args = ["/bin/printf", "[%s]", "a b", "", "$HOME", "'\"\\", "ünï", "-x", "--"];
    rig.container("args").args(args).output().ok().prints("[a b][][$HOME]['\"\\][ünï][-x][--]");
}

/// As git does it with each of its objects.
fn the_other_names_of_a_file_go_on_when_one_is_removed(rig: &mut Rig) {
    let script = "mkdir /d; cd /d; echo kept > one; ln one two; cat two; rm one; cat two; echo new > one
        mv one three; ln three four; mv two three; cat three four; rm three; cat four; ls; stat -c %h four";
    rig.container("names").sh(script).output().ok().prints("kept\nkept\nkept\nnew\nnew\nfour\n1");
}

fn environment_and_working_directory_are_those_asked_for(rig: &mut Rig) {
    rig.container("env")
        .flag("--env", "GREETING=hello world")
        .flag("--env", "EMPTY=")
        .flag("--cwd", "/var/tmp")
        .sh("echo \"$FROM_IMAGE/$GREETING/${EMPTY-unset}/${OTHER-unset}\"; pwd")
        .output()
        .ok()
        .prints("yes/hello world//unset\n/var/tmp");
}

fn user_groups_umask_and_hostname_are_those_of_the_specification(rig: &mut Rig) {
    let (name, uid) = USER;
    let run = rig.container_by_spec("user", |spec| {
        spec["process"]["user"] = json!({"uid": uid, "gid": uid, "additionalGids": [2000], "umask": 0o027});
        spec["process"]["args"] = json!(["/bin/sh", "-c", "id; umask; hostname"]);
        spec["hostname"] = "box".into();
    });
    let expected = format!("uid={uid}({name}) gid={uid}({name}) groups=2000(extra)");
    let output = run.output().ok();
    let text = output.text();
    let mut lines = text.lines();
    assert!(
        lines.next().is_some_and(|id| id.replace(&format!("{uid}({name}),2000"), "2000") == expected),
        "{output}"
    );
    assert_eq!(lines.collect::<Vec<_>>(), ["0027", "box"], "{output}");
}

fn limits_capabilities_and_no_new_privileges_hold(rig: &mut Rig) {
    let run = rig.container_by_spec("limits", |spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}]);
        let caps = json!(["CAP_CHOWN", "CAP_KILL"]);
        spec["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps});
        spec["process"]["noNewPrivileges"] = true.into();
        spec["process"]["oomScoreAdj"] = 321.into();
        let script = "ulimit -n; ulimit -Hn; grep -E 'Cap(Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status; \
                      cat /proc/self/oom_score_adj";
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
    });
    run.output().ok().prints(
        "123\n456\nCapEff:\t0000000000000021\nCapBnd:\t0000000000000021\nCapAmb:\t0000000000000000\n\
         NoNewPrivs:\t1\n321",
    );
}

fn sysctls_and_tmpfs_are_those_of_the_specification(rig: &mut Rig) {
    let run = rig.container_by_spec("sysctl", |spec| {
        spec["linux"]["sysctl"] = json!({"kernel.msgmax": "12345", "net.ipv4.ip_forward": "1"});
        let tmpfs = json!({
            "destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "noexec", "size=1024k", "mode=700"],
        });
        spec["mounts"].as_array_mut().expect("a list").push(tmpfs);
        let script = "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward; stat -f -c %b /scratch; \
                      stat -c %a /scratch; dd if=/dev/zero of=/scratch/f bs=1k count=2000 2>/dev/null || echo full; \
                      cp /bin/busybox /scratch/ 2>/dev/null; printf '#!/bin/sh' > /scratch/x; chmod +x /scratch/x; \
                      /scratch/x 2>/dev/null || echo noexec";
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
    });
    run.output().ok().prints("12345\n1\n256\n700\nfull\nnoexec");
}

fn no_signal_is_blocked_or_ignored(rig: &mut Rig) {
    let run = rig.container("signals").args(["/bin/grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]);
    let output = run.output().ok();
    let text = output.text();
    let masks = text.lines().filter_map(|line| u64::from_str_radix(line.split('\t').nth(1)?, 16).ok());
    // Above 31 are the signals that threading libraries use for themselves.
    assert_eq!(masks.map(|mask| mask & 0x7fff_ffff).collect::<Vec<_>>(), [0, 0], "{output}");
}

fn a_seccomp_filter_holds(rig: &mut Rig) {
    let run = rig.container_by_spec("seccomp", |spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
        });
        let script = "grep Seccomp: /proc/self/status; mkdir /tmp/d 2>/dev/null || echo refused";
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
    });
    run.output().ok().prints("Seccomp:\t2\nrefused");
}

fn masked_and_read_only_paths_hold(rig: &mut Rig) {
    let run = rig.container_by_spec("masked", |spec| {
        spec["linux"]["maskedPaths"] = json!(["/etc/marker", "/home"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/var"]);
        let script = "wc -c < /etc/marker; ls -A /home | wc -l; touch /var/f 2>/dev/null || echo read-only; \
                      echo 1 2>/dev/null > /proc/sys/kernel/msgmax || echo read-only; touch /tmp/f && echo written";
        spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
    });
    run.output().ok().prints("0\n0\nread-only\nread-only\nwritten");
}

fn a_program_that_does_not_exist_is_named(rig: &mut Rig) {
    rig.container("missing").args(["/no/such/program"]).output().fails_naming(&["/no/such/program"]);
}

fn the_root_is_the_images_and_can_be_written(rig: &mut Rig) {
    let (file, text) = MARKER;
    let script = format!(
        "cat /{file}; echo changed > /{file}; cat /{file}; rm -r /home; mkdir /new; ls -d /home /new"
    );
    rig.container("one").sh(&script).output().exits(1).prints(&format!("{text}\nchanged\n/new"));
    rig.container("two")
        .sh(&format!("cat /{file}; ls -d /home /new"))
        .output()
        .exits(1)
        .prints(&format!("{text}\n/home"));
}

fn a_read_only_root_cannot_be_written(rig: &mut Rig) {
    let script = "touch /f 2>/dev/null || echo read-only; touch /dev/shm/f && echo written";
    rig.container("ro").switch("--read-only").sh(script).output().ok().prints("read-only\nwritten");
}

fn devices_and_kernel_file_systems_are_there(rig: &mut Rig) {
    let script = "for f in null zero full random urandom tty ptmx; do test -c /dev/$f || echo no $f; done; \
                  for f in fd stdin stdout stderr; do test -L /dev/$f || echo no $f; done; \
                  echo x > /dev/null; head -c 4 /dev/zero | wc -c; \
                  awk '$2 ~ \"^/(proc|dev|dev/pts|dev/shm|dev/mqueue|sys)$\" {print $2, $3}' /proc/mounts | sort; \
                  test -d /sys/fs && echo sysfs is filled; sh -c 'exit $(ls /proc | grep -c \"^[0-9]\")'; \
                  test $? -lt 9 && echo own processes only";
    rig.container("dev").sh(script).output().ok().prints(
        "4\n/dev tmpfs\n/dev/mqueue mqueue\n/dev/pts devpts\n/dev/shm tmpfs\n/proc proc\n/sys sysfs\n\
         sysfs is filled\nown processes only",
    );
}
