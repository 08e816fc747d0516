//! What every benchmark works with: the rig, the subjects, how often to repeat, where samples go.

use std::path::Path;
use std::process::Stdio;

use vmctr_tests::rig::command::Running;
use vmctr_tests::rig::container::{Container, Run};
use vmctr_tests::rig::{RUNC, Rig, VMCTR};

use super::machine;
use super::results::{COMMIT_REFERENCE, Key, REFERENCE, Results, Unit};

/// Who is measured. A further way to start a VM is a further subject.
#[derive(Debug, PartialEq, Eq)]
pub struct Subject {
    /// Its name in the results.
    pub name: &'static str,
    runtime: &'static str,
    annotations: &'static [(&'static str, &'static str)],
}

const TEMPLATE: Subject = Subject { name: "vmctr", runtime: VMCTR, annotations: &[] };
const COLD: Subject = Subject { name: "cold", runtime: VMCTR, annotations: &[("io.vmctr.start", "cold")] };
const POOL: Subject = Subject { name: "pool", runtime: VMCTR, annotations: &[("io.vmctr.start", "pool")] };
const RUNC_ITSELF: Subject = Subject { name: REFERENCE, runtime: RUNC, annotations: &[] };

/// In the order of their turns. vmctr starts from a template, as it does unless told otherwise.
pub const SUBJECTS: [Subject; 2] = [TEMPLATE, RUNC_ITSELF];

/// Where the way to start matters.
pub const STARTS: [Subject; 3] = [TEMPLATE, COLD, RUNC_ITSELF];

/// Takes waiting VMs. Measured apart: making the next one would disturb the others.
pub const POOLED: [Subject; 1] = [POOL];

/// Who commits beside vmctr.
pub const BUILDAH: Subject = Subject::named(COMMIT_REFERENCE);

impl Subject {
    /// One that runs no containers.
    pub const fn named(name: &'static str) -> Self {
        Self { name, runtime: "", annotations: &[] }
    }

    /// Whether each of its containers has a VM.
    pub fn has_vm(&self) -> bool {
        self.runtime == VMCTR
    }

    /// A container to run.
    pub fn of<'rig>(&self, mut run: Run<'rig>) -> Run<'rig> {
        for (key, value) in self.annotations {
            run = run.annotation(key, value);
        }
        run.under(self.runtime)
    }
}

/// A run of the program.
pub struct Bench<'rig> {
    /// The containerd.
    pub rig: &'rig Rig,
    quick: bool,
    results: Results,
    containers: u32,
}

impl<'rig> Bench<'rig> {
    /// Notes the machine's facts. One container of each subject runs before the first measured one, which then
    /// pays for nothing that is done once.
    pub fn new(rig: &'rig Rig, quick: bool) -> Self {
        let mut bench = Self { rig, quick, results: Results::default(), containers: 0 };
        bench.results.machine = machine::facts();
        for subject in &SUBJECTS {
            progress("warm-up", subject.name);
            let container = bench.idle(subject);
            if subject.has_vm() {
                bench.results.machine.extend(machine::vm_facts(rig, container.id()));
            }
            container.remove();
        }
        bench
    }

    /// What was measured.
    pub fn finish(self) -> Results {
        self.results
    }

    /// Whether all should be quick rather than exact.
    pub fn is_quick(&self) -> bool {
        self.quick
    }

    /// So many, or few when that is all that is wanted.
    pub fn repeats(&self, many: usize) -> usize {
        if self.quick { many.min(2) } else { many }
    }

    /// These sizes, or only the smallest.
    pub fn sizes<T: Copy>(&self, sizes: &'static [T]) -> &'static [T] {
        if self.quick { &sizes[..1] } else { sizes }
    }

    /// Calls `one` so many times for each subject in turn.
    pub fn alternate(&mut self, what: &str, times: usize, one: impl FnMut(&mut Self, &'static Subject)) {
        self.alternate_among(&SUBJECTS, what, times, one);
    }

    /// The same for other subjects.
    pub fn alternate_among(
        &mut self,
        subjects: &'static [Subject],
        what: &str,
        times: usize,
        mut one: impl FnMut(&mut Self, &'static Subject),
    ) {
        for turn in 1..=times {
            for subject in subjects {
                progress(what, &format!("{} {turn} of {times}", subject.name));
                one(self, subject);
            }
        }
    }

    /// Adds a sample.
    pub fn add(
        &mut self,
        benchmark: &'static str,
        what: impl Into<String>,
        subject: &Subject,
        unit: Unit,
        sample: f64,
    ) {
        let key = Key { benchmark, what: what.into(), subject: subject.name };
        self.results.add(key, unit, sample);
    }

    /// A container of the busybox image that runs nothing yet.
    pub fn container(&mut self, subject: &Subject) -> Run<'rig> {
        let name = self.next_name();
        subject.of(self.rig.container(&name))
    }

    /// A container of another image.
    pub fn container_of(&mut self, subject: &Subject, image: &str) -> Run<'rig> {
        let name = self.next_name();
        subject.of(self.rig.container_of(image, &name))
    }

    /// A container of a folder.
    pub fn container_in(&mut self, subject: &Subject, root: &Path) -> Run<'rig> {
        let name = self.next_name();
        subject.of(self.rig.container_in(root, &name))
    }

    /// A container that runs and does nothing.
    pub fn idle(&mut self, subject: &Subject) -> Container<'rig> {
        idle(self.container(subject))
    }

    fn next_name(&mut self) -> String {
        self.containers += 1;
        format!("bench-{}", self.containers)
    }
}

/// Starts a container that does nothing.
pub fn idle(run: Run<'_>) -> Container<'_> {
    run.args(["/bin/sleep", "3600"]).detached()
}

/// Starts `ctr run` in the foreground with its output to be read.
pub fn in_foreground(run: &Run) -> Running {
    Running::start_with(run.command().stdin(Stdio::null()).stdout(Stdio::piped()))
}

/// Tells whoever waits.
pub fn progress(benchmark: &str, what: &str) {
    eprintln!("{benchmark}: {what}");
}
