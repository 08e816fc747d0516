//! `vmctr-bench`: that it measures, not what: a machine under test is no machine to measure on.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use vmctr_tests::rig::command::{self, Running, TIME_LIMIT, eventually};
use vmctr_tests::rig::{prerequisites, proc, vm};

fn bench() -> Command {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_vmctr-bench"));
    bench.arg("--quick");
    bench
}

#[test]
fn starts_are_measured_in_their_parts_and_beside_runc() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("new/results.json");
    let output = command::run(bench().arg("start").arg("--output").arg(&file)).ok();
    let text = output.text();
    assert!(text.contains("first output of ctr run"), "{output}");

    let results: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert!(results["machine"]["qemu"].is_string(), "{results}");
    let figures = results["figures"].as_array().unwrap();
    let find = |what: &str, subject: &str| {
        let found = figures.iter().find(|figure| figure["what"] == what && figure["subject"] == subject);
        found.unwrap_or_else(|| panic!("no {what} of {subject}: {results}"))
    };
    for subject in ["vmctr", "cold", "pool", "runc"] {
        assert_eq!(find("first output of ctr run", subject)["samples"].as_array().unwrap().len(), 2);
    }
    let whole = find("first output of ctr run", "cold")["samples"][0].as_f64().unwrap();
    let parts = ["prepare", "spawn", "boot", "hello", "mount", "create", "start"];
    let parts: f64 = parts.map(|part| find(part, "cold")["samples"][0].as_f64().unwrap()).iter().sum();
    assert!(parts > 0.0 && parts < whole, "the parts take {parts} s of {whole} s");
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let running = Running::start_with(bench().arg("start").stdin(Stdio::null()).stdout(Stdio::null()));
    let pid = running.pid();
    // A program's arguments are there a moment later than the program.
    let tag = || {
        let mut all = proc::all().into_iter().filter(|found| proc::parent(*found) == Some(pid));
        let containerd = all.find(|found| proc::program(*found) == "containerd")?;
        let line = proc::command_line(containerd);
        let config = line.split(' ').next_back()?;
        config.split('/').nth(2).map(str::to_owned)
    };
    eventually("its containerd runs", TIME_LIMIT, || tag().is_some());
    let tag = tag().expect("just seen");
    let mentioned = || proc::all().into_iter().filter(|pid| proc::mentions(*pid, &tag)).count();
    eventually("a VM runs", TIME_LIMIT, || {
        proc::all().iter().any(|pid| proc::mentions(*pid, &tag) && proc::program(*pid).starts_with("qemu"))
    });

    vm::signal(pid, Signal::SIGINT);
    let output = running.finish_within(Duration::from_secs(30)).exits(130);
    assert!(output.errors().ends_with("nothing was written\n"), "{output}");
    assert_eq!(mentioned(), 0);
    for place in [PathBuf::from("/tmp"), prerequisites::cgroup2()] {
        assert!(!place.join(&tag).exists(), "{tag} is left in {}", place.display());
    }
}
