//! Who mounts a union, and its end.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{UnmountFlags, unmount};
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::{Output, eventually, run};
use vmctr_tests::rig::prerequisites;

use super::super::bench::Subject;
use super::super::results::UNION_REFERENCE;

/// Longer than the VM's process lets pass between two reports of its figures.
const REPORTED: std::time::Duration = std::time::Duration::from_millis(200);

/// A way to mount.
pub struct Way {
    /// Its name in the results.
    pub subject: Subject,
    by: By,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Vmctr,
    Kernel,
    Fuse,
}

/// In the order of their turns.
pub const WAYS: [Way; 3] = [
    Way { subject: Subject::named("vmctr"), by: By::Vmctr },
    Way { subject: Subject::named(UNION_REFERENCE), by: By::Kernel },
    Way { subject: Subject::named("fuse-overlayfs"), by: By::Fuse },
];

/// A mounted union.
pub struct Mounted<'rig> {
    rig: &'rig Rig,
    by: By,
    root: PathBuf,
}

impl<'rig> Mounted<'rig> {
    pub fn new(rig: &'rig Rig, way: &Way, (options, root): (&str, PathBuf)) -> Self {
        let mounted = Self { rig, by: way.by, root };
        match way.by {
            By::Vmctr => mounted.vmctr(&["mount", "-o", options]),
            By::Kernel => {
                let options = format!("{options},redirect_dir=on,index=off,metacopy=off");
                run(Command::new("mount")
                    .args(["-t", "overlay", "overlay", "-o", &options])
                    .arg(&mounted.root))
            }
            By::Fuse => {
                let program = prerequisites::program("fuse-overlayfs");
                run(Command::new(program).args(["-o", options]).arg(&mounted.root))
            }
        }
        .ok();
        mounted
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    fn vmctr(&self, args: &[&str]) -> Output {
        run(self.rig.vmctr_command().args(["--json", "union"]).args(args).arg(&self.root))
    }

    /// How often the VM was asked; `None` where there is no VM.
    pub fn turns(&self) -> Option<f64> {
        if self.by != By::Vmctr {
            return None;
        }
        std::thread::sleep(REPORTED);
        let view = self.vmctr(&["inspect"]).ok().json();
        Some(view["relay"]["turns"].as_f64().unwrap_or_else(|| panic!("no turns in {view}")))
    }

    /// Unmounts, and waits until whoever served the mount has ended.
    pub fn end(self) {
        if self.by == By::Vmctr {
            self.vmctr(&["umount"]).ok();
            return;
        }
        let gone = || unmount(&self.root, UnmountFlags::empty()).is_ok();
        eventually("the union is unmounted", REPORTED * 50, gone);
    }
}
