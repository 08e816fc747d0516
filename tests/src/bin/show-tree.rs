//! A program for a container: everything in a folder, a line each, as tests on the host tell it.
//!
//! ```text
//!   show-tree PATH
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use vmctr_tests::rig::image::tree_lines;

fn main() -> ExitCode {
    let Some(root) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: show-tree PATH");
        return ExitCode::from(2);
    };
    print!("{}", tree_lines(&root).concat());
    ExitCode::SUCCESS
}
