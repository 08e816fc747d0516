//! Several `ctr run --rm` at the same time: how long until the last of them has said something.

use std::io::Read;
use std::time::Instant;

use super::bench::{Bench, STARTS, Subject, in_foreground};
use super::results::Unit::Seconds;

const NAME: &str = "concurrent";

const COUNTS: [usize; 2] = [2, 5];

pub fn measure(bench: &mut Bench) {
    let repeats = bench.repeats(5);
    for count in bench.sizes(&COUNTS) {
        bench.alternate_among(&STARTS, NAME, repeats, |bench, subject| together(bench, subject, *count));
    }
}

fn together(bench: &mut Bench, subject: &'static Subject, count: usize) {
    let mut runs = Vec::new();
    runs.resize_with(count, || bench.container(subject).args(["/bin/echo", "hello"]));
    let began = Instant::now();
    let mut running: Vec<_> = runs.iter().map(in_foreground).collect();
    let mut outputs: Vec<_> = running.iter_mut().map(|ctr| ctr.stdout()).collect();
    // Whichever comes last, when all have been read it has come.
    for output in &mut outputs {
        output.read_exact(&mut [0]).expect("the container prints something");
    }
    let took = began.elapsed().as_secs_f64();
    for ctr in running {
        ctr.finish().ok();
    }
    bench.add(NAME, format!("first output of the last of {count}"), subject, Seconds, took);
}
