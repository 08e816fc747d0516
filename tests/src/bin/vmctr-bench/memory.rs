//! What idle containers cost: the proportional set size of all processes that are there for them, so that what is
//! shared counts once.
//!
//! ```text
//!   containerd-shim ──┬── qemu ─────── guest RAM: mapped by QEMU, the shim and the share daemon; counted by itself
//!                     ├── vmctr-fsd ── its serving process
//!                     └── (runc) the container's own process, which under vmctr is in guest RAM
//! ```

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use vmctr_tests::rig::container::Container;
use vmctr_tests::rig::{Rig, proc};

use super::bench::{Bench, SUBJECTS, Subject, progress};
use super::results::Unit::Mib;

const NAME: &str = "memory";

const COUNTS: [usize; 3] = [1, 5, 10];

/// What a start leaves to do in the background is over then.
const SETTLE: Duration = Duration::from_secs(3);

/// Whose memory it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Shim,
    Qemu,
    Share,
    Container,
}

impl Part {
    fn of(program: &str) -> Self {
        match program {
            name if name.starts_with("containerd-shim") => Self::Shim,
            name if name.starts_with("qemu") => Self::Qemu,
            name if name.starts_with("vmctr-fsd") => Self::Share,
            _ => Self::Container,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Shim => "  shim",
            Self::Qemu => "  QEMU",
            Self::Share => "  share daemon",
            Self::Container => "  the container's process",
        }
    }
}

/// One container's memory in bytes.
#[derive(Default)]
struct Used {
    own: BTreeMap<Part, u64>,
    /// Guest RAM that has been touched.
    ram: u64,
}

pub fn measure(bench: &mut Bench) {
    let mut all = SUBJECTS.each_ref().map(|subject| (subject, Vec::new()));
    for count in bench.sizes(&COUNTS) {
        for (subject, containers) in &mut all {
            progress(NAME, &format!("{} {count} idle", subject.name));
            containers.resize_with(*count, || bench.idle(subject));
            thread::sleep(SETTLE);
            for container in containers {
                add(bench, subject, *count, &used(bench.rig, container));
            }
        }
    }
    all.into_iter().flat_map(|(_, containers)| containers).for_each(Container::remove);
}

fn add(bench: &mut Bench, subject: &Subject, count: usize, used: &Used) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let own: u64 = used.own.values().sum();
    bench.add(NAME, format!("each of {count} idle"), subject, Mib, mib(own + used.ram));
    bench.add(NAME, format!("each of {count} idle, beside guest RAM"), subject, Mib, mib(own));
    for (part, bytes) in &used.own {
        bench.add(NAME, format!("{} (of {count})", part.name()), subject, Mib, mib(*bytes));
    }
    if subject.has_vm() {
        bench.add(NAME, format!("  guest RAM touched (of {count})"), subject, Mib, mib(used.ram));
    }
}

fn used(rig: &Rig, container: &Container) -> Used {
    let mut used = Used::default();
    for pid in family(shim(rig, container.id())) {
        let part = Part::of(&proc::program(pid));
        *used.own.entry(part).or_default() += proc::pss_beside_ram(pid).expect("it runs");
        if part == Part::Qemu {
            used.ram += proc::ram_bytes(pid);
        }
    }
    used
}

/// The shim, which names its container on its command line.
pub fn shim(rig: &Rig, id: &str) -> u32 {
    let argument = format!(" -id {id} ");
    let is_shim = |pid: &u32| {
        let line = proc::command_line(*pid);
        Part::of(&proc::program(*pid)) == Part::Shim && line.contains(&argument)
    };
    let address = rig.daemon().address().display().to_string();
    let mut found = proc::all().into_iter().filter(is_shim).filter(|pid| proc::mentions(*pid, &address));
    found.next().unwrap_or_else(|| panic!("{id} has no shim"))
}

/// A process and all below it.
fn family(root: u32) -> Vec<u32> {
    let mut family = vec![root];
    let mut next = 0;
    while let Some(parent) = family.get(next).copied() {
        family.extend(proc::all().into_iter().filter(|pid| proc::parent(*pid) == Some(parent)));
        next += 1;
    }
    family
}
