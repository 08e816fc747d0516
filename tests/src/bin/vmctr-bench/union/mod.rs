//! Union mounts: vmctr's, through its VM, and on equal folders the kernel's overlay and fuse-overlayfs.
//!
//! ```text
//!   tree      the folders: 10,000 small files and folders in two layers, one large file
//!   subjects  who mounts them
//!   work      find, tar, read ── write, create, copy up, rename, remove
//! ```
//!
//! *Cold* is a fresh mount, and a host that holds none of the files' bytes in its page cache. *Warm* is the same
//! once more. How often each of vmctr's workloads asks the VM, and what asking once costs, is measured beside the
//! times: what another accelerator would make of them can be reckoned from that.

mod subjects;
mod tree;
mod work;

use std::time::Instant;

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

use self::subjects::{Mounted, WAYS, Way};
use self::tree::Tree;
use self::work::{MICRO, Step, TURNS};
use super::bench::{Bench, Subject, progress};
use super::results::Unit;

const NAME: &str = "union";

pub fn measure(bench: &mut Bench) {
    // From here on nothing stays mounted, however the program ends. It is the last benchmark: nobody else minds.
    unshare(CloneFlags::CLONE_NEWNS).expect("root may");
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).expect("a namespace of our own");
    progress(NAME, "making the folders");
    let tree = Tree::make(&bench.rig.new_folder("union"), if bench.is_quick() { 20 } else { 1 });
    let times = bench.repeats(3);
    for turn in 1..=times {
        for way in &WAYS {
            progress(NAME, &format!("{} {turn} of {times}", way.subject.name));
            one(bench, &tree, way);
        }
    }
    tree.remove();
}

/// What is united.
type Options = fn(&Tree) -> String;

/// Several mounts: what is cold for one workload is not for the next.
fn one(bench: &mut Bench, tree: &Tree, way: &'static Way) {
    let mounts: [(&[Step], Options); 4] = [
        (work::FINDING, Tree::options),
        (work::READING, Tree::options),
        (work::READ_ONLY, Tree::lowers),
        (work::WRITING, Tree::options),
    ];
    for (steps, options) in mounts {
        tree.forget_pages();
        let options = options(tree);
        let mounted = Mounted::new(bench.rig, way, (&options, tree.mountpoint()));
        for step in steps {
            timed(bench, &mounted, &way.subject, step, tree);
        }
        mounted.end();
    }
}

fn timed(bench: &mut Bench, mounted: &Mounted<'_>, subject: &Subject, step: &Step, tree: &Tree) {
    let before = mounted.turns();
    let begun = Instant::now();
    let count = (step.work)(mounted.root(), tree);
    let took = begun.elapsed().as_secs_f64();
    let after = mounted.turns();
    if step.what == TURNS {
        return bench.add(NAME, TURNS, subject, Unit::Microseconds, took / count as f64 * MICRO);
    }
    let what = if step.counted { format!("{} {count} {}", step.what, step.of) } else { step.what.to_owned() };
    bench.add(NAME, what.clone(), subject, Unit::Seconds, took);
    if let (Some(before), Some(after)) = (before, after) {
        bench.add(NAME, format!("  {what}: turns"), subject, Unit::Turns, after - before);
    }
}
