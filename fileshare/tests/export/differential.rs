//! Random operations on our mount and on a kernel overlay over the same lower folder: the same results, the same
//! tree, the same upper folder.

use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use vmctr_fileshare::export::host::Writes;

use super::apart::Spec;
use super::rig::{Mounted, Place, as_user, in_private_namespace};
use super::steps::{USER, act, fill, outcome, step, tree};

#[test]
fn random_operations_give_what_a_kernel_overlay_gives() {
    in_private_namespace(|| {
        let place = Place::new();
        let lower = place.folder("lower");
        fill(&lower);
        let count = std::cell::Cell::new(0);
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) };
        let steps = prop::collection::vec(step(), 1..80);
        TestRunner::new(config)
            .run(&steps, |steps| {
                let number = count.replace(count.get() + 1);
                let kernel = place.overlay(&format!("kernel{number}"), &lower);
                let ours = place.overlay(&format!("ours{number}"), &lower);
                let mountpoint = place.folder("mnt");
                // Each second one is served from the layers where it can be.
                let layers =
                    (number % 2 == 0).then(|| (place.path(&format!("ours{number}/upper")), lower.clone()));
                let writes = Writes::Through;
                let mounted =
                    Mounted::apart(&Spec { folder: &ours, mountpoint: &mountpoint, writes, layers });
                for (step, by_user) in &steps {
                    let run = |root: &Path| {
                        let act = || outcome(act(root, step));
                        if *by_user { as_user(USER, &[], act) } else { act() }
                    };
                    prop_assert_eq!(run(&mounted.root), run(&kernel), "{:?}, by user: {}", step, by_user);
                }
                prop_assert_eq!(tree(&mounted.root, false), tree(&kernel, false));
                mounted.unmount();
                let upper = |side: &str| tree(&place.path(&format!("{side}{number}/upper")), true);
                prop_assert_eq!(upper("ours"), upper("kernel"));
                for merged in [ours, kernel] {
                    rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::DETACH).unwrap();
                }
                Ok(())
            })
            .unwrap();
    });
}
