//! The end of an idle container: from SIGKILL until containerd knows of its exit, then its deletion with all that it had.

use vmctr_tests::rig::api;

use super::bench::{Bench, Subject};
use super::log;
use super::results::Unit::Seconds;

const NAME: &str = "stop";

pub fn measure(bench: &mut Bench) {
    let repeats = bench.repeats(10);
    bench.alternate(NAME, repeats, one);
}

fn one(bench: &mut Bench, subject: &'static Subject) {
    let container = bench.idle(subject);
    let id = container.id().to_owned();
    let stop = api::kill(bench.rig, &id).unwrap_or_else(|e| panic!("cannot kill {id}: {e}")).as_secs_f64();
    let delete = api::timed_delete(bench.rig, &id).unwrap_or_else(|e| panic!("cannot delete {id}: {e}"));
    let delete = delete.as_secs_f64();
    container.forget();

    bench.add(NAME, "stop and delete", subject, Seconds, stop + delete);
    bench.add(NAME, "  SIGKILL to exit", subject, Seconds, stop);
    bench.add(NAME, "  delete", subject, Seconds, delete);
    if subject.has_vm() {
        for (name, seconds) in log::wait_for(bench.rig, &id, "Container deleted").steps {
            bench.add(NAME, format!("    {name}"), subject, Seconds, seconds);
        }
    }
}
