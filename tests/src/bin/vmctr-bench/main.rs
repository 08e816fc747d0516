//! `vmctr-bench`: what a container costs under vmctr, and under runc on the same machine in the same minutes.
//!
//! ```text
//!   start  concurrent  stdio  share  memory  stop  commit  union     one file each: it runs containers and adds samples
//!        └──────────┴────┬───┴──────┴───────┴─────┴───────┘
//!   bench                the rig, the subjects, how often
//!   results ──> table    stdout, for people
//!          └──> JSON     --output, for programs, with the machine's facts
//! ```
//!
//! Repeats alternate between the subjects, so that a machine that gets slower does so for all of them. Nothing is
//! left, whether the program ends by itself, fails or is interrupted.

mod bench;
mod commit;
mod concurrent;
mod log;
mod machine;
mod memory;
mod pool;
mod results;
mod samples;
mod share;
mod start;
mod stdio;
mod stop;
mod streams;
mod table;
mod union;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use clap::{Parser, ValueEnum};
use nix::sys::signal::SigSet;
use vmctr_tests::rig::{Rig, interrupt};

use bench::Bench;
use results::Results;

/// Something hangs when it takes so long.
const LIMIT_SECONDS: u32 = 45 * 60;

/// Measures containers under vmctr, and under runc beside it.
#[derive(Parser)]
struct Arguments {
    /// What to measure; everything without a name
    benchmarks: Vec<Benchmark>,
    /// Few repeats: to see that it works
    #[arg(long)]
    quick: bool,
    /// Also write the results there, as JSON
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// In the order in which they run and are shown.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Benchmark {
    Start,
    Concurrent,
    Stdio,
    Share,
    Memory,
    Stop,
    Commit,
    Union,
}

impl Benchmark {
    fn measure(self, bench: &mut Bench) {
        match self {
            Self::Start => start::measure(bench),
            Self::Concurrent => concurrent::measure(bench),
            Self::Stdio => stdio::measure(bench),
            Self::Share => share::measure(bench),
            Self::Memory => memory::measure(bench),
            Self::Stop => stop::measure(bench),
            Self::Commit => commit::measure(bench),
            Self::Union => union::measure(bench),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let signals = interrupt::hold_back(LIMIT_SECONDS);
    // A panic ends the thread only, and with it the rig.
    let done = thread::spawn(move || run(&arguments, signals)).join();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupt::happened() => {
            eprintln!("Interrupted: nothing is left and nothing was written");
            ExitCode::from(130)
        }
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(arguments: &Arguments, signals: SigSet) {
    let rig = Rig::measuring();
    interrupt::watch(signals, rig.tag());
    let mut bench = Bench::new(&rig, arguments.quick);
    for benchmark in Benchmark::value_variants() {
        if arguments.benchmarks.is_empty() || arguments.benchmarks.contains(benchmark) {
            benchmark.measure(&mut bench);
        }
    }
    let results = bench.finish();
    print!("{}", table::text(&results));
    if let Some(file) = &arguments.output {
        write(file, &results);
    }
}

/// Beside the old results first, so that these are whole or not there.
fn write(file: &Path, results: &Results) {
    let part = file.with_extension("part");
    let folder = file.parent().expect("a file has a folder");
    fs::create_dir_all(folder).unwrap_or_else(|e| panic!("cannot make {}: {e}", folder.display()));
    let text = format!("{:#}\n", results.json());
    fs::write(&part, text)
        .and_then(|()| fs::rename(&part, file))
        .unwrap_or_else(|e| panic!("cannot write {}: {e}", file.display()));
    println!("\nAs JSON: {}", file.display());
}
