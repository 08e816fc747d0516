//! How fast bytes flow out of a container, into it, and through a `cat` in it. containerd's `ctr` and its FIFOs are
//! part of the way for everybody.

use std::io::Write;
use std::process::ChildStdin;
use std::thread;
use std::time::Duration;

use vmctr_tests::rig::container::Container;

use super::bench::{Bench, SUBJECTS, Subject, progress};
use super::results::Unit::MibPerSecond;
use super::streams::{BLOCK, Script};

const NAME: &str = "stdio";

const MIB: u64 = 128;
const BLOCKS: u64 = (MIB << 20) / BLOCK as u64;

pub fn measure(bench: &mut Bench) {
    progress(NAME, "starting the containers");
    let containers = SUBJECTS.each_ref().map(|subject| (subject.name, bench.idle(subject)));
    let repeats = bench.repeats(5);
    bench.alternate(NAME, repeats, |bench, subject| {
        let (_, container) =
            containers.iter().find(|(name, _)| *name == subject.name).expect("each has a container");
        one(bench, subject, container);
    });
    for (_, container) in containers {
        container.remove();
    }
}

fn one(bench: &mut Bench, subject: &Subject, container: &Container) {
    for (what, took) in [
        ("out of the container", out(container)),
        ("into the container", into(container)),
        ("through cat", through(container)),
    ] {
        bench.add(NAME, what, subject, MibPerSecond, MIB as f64 / took.as_secs_f64());
    }
}

fn out(container: &Container) -> Duration {
    let dd = format!("exec dd if=/dev/zero bs={BLOCK} count={BLOCKS} 2>/dev/null");
    let mut script = Script::start(container, &dd);
    let took = script.read(MIB << 20);
    script.finish();
    took
}

fn into(container: &Container) -> Duration {
    let dd = format!("dd of=/dev/null bs={BLOCK} count={BLOCKS} iflag=fullblock 2>/dev/null && echo done");
    let mut script = Script::start(container, &dd);
    let writer = write(script.stdin());
    let took = script.done();
    drop(writer.join().expect("the writer does not panic"));
    script.finish();
    took
}

fn through(container: &Container) -> Duration {
    let mut script = Script::start(container, "exec cat");
    let writer = write(script.stdin());
    let took = script.read(MIB << 20);
    drop(writer.join().expect("the writer does not panic"));
    script.finish();
    took
}

/// The input's end comes with the drop of what the thread returns.
fn write(mut stdin: ChildStdin) -> thread::JoinHandle<ChildStdin> {
    thread::spawn(move || {
        let block = vec![0; BLOCK];
        for _ in 0..BLOCKS {
            stdin.write_all(&block).expect("the container reads");
        }
        stdin
    })
}
