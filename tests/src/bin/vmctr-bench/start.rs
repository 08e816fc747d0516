//! From the call of `ctr run --rm` to the container's first output and to the end, and the parts of the first.
//!
//! ```text
//!   ctr ─> containerd ─> shim serves │ prepare spawn boot hello mount create │ .. │ start │ output      cold
//!                                    │ prepare spawn copy restore resume hello mount ...                template
//!                                    │ prepare take plug mount ...                                      pool
//!   └──── until the shim serves ─────┘ └─────────── the shim's own steps ───────────────────────┘
//!   └────────────────────────────── first output ────────────────────────────────────────────────────┘
//! ```

use std::io::{self, Read};
use std::time::{Duration, SystemTime};

use super::bench::{Bench, POOLED, STARTS, Subject, in_foreground};
use super::log;
use super::pool::Pool;
use super::results::Unit::Seconds;

const NAME: &str = "start";

pub fn measure(bench: &mut Bench) {
    let repeats = bench.repeats(10);
    bench.alternate_among(&STARTS, NAME, repeats, one);
    let pool = Pool::start(bench.rig);
    bench.alternate_among(&POOLED, NAME, repeats, |bench, subject| {
        pool.wait_until_filled();
        one(bench, subject);
    });
}

fn one(bench: &mut Bench, subject: &'static Subject) {
    let run = bench.container(subject).args(["/bin/echo", "hello"]);
    let began = SystemTime::now();
    let mut ctr = in_foreground(&run);
    let mut stdout = ctr.stdout();
    let since = || began.elapsed().expect("the clock goes on");
    if let Err(error) = stdout.read_exact(&mut [0]) {
        // It says why.
        ctr.finish().ok();
        panic!("the container prints nothing: {error}");
    }
    let output = since();
    // ctr closes it when it ends.
    io::copy(&mut stdout, &mut io::sink()).expect("readable");
    let end = since();
    ctr.finish().ok();

    bench.add(NAME, "first output of ctr run", subject, Seconds, output.as_secs_f64());
    if subject.has_vm() {
        parts(bench, subject, run.id(), began, output);
    }
    bench.add(NAME, "end of ctr run --rm", subject, Seconds, end.as_secs_f64());
}

fn parts(bench: &mut Bench, subject: &Subject, id: &str, began: SystemTime, output: Duration) {
    let serves = log::wait_for(bench.rig, id, "Shim started").at;
    let serves = serves.duration_since(began).expect("one clock").as_secs_f64();
    let steps = log::wait_for(bench.rig, id, "Container started").steps;
    let sum: f64 = steps.iter().map(|(_, seconds)| seconds).sum();
    bench.add(NAME, "  ctr, containerd, shim start", subject, Seconds, serves);
    for (name, seconds) in steps {
        bench.add(NAME, format!("  {name}"), subject, Seconds, seconds);
    }
    let rest = output.as_secs_f64() - serves - sum;
    bench.add(NAME, "  between these, and output", subject, Seconds, rest);
}
