//! Random changes in the kernel's overlay, committed and applied again, equal the merged view.
//!
//! ```text
//! operations ─> upper on two lowers ─┬─ layer, our own reader ──> plain folder ─┐
//!               (the kernel's        ├─ image, umoci ───────────> plain folder ─┼─ equal to the
//!                overlay)            ├─ new folder, kernel's overlay over it ───┤  kernel's merged
//!                                    └─ our own merged view ────────────────────┘  view
//! ```

#![allow(clippy::unwrap_used)] // helpers of tests

mod rig;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rig::{
    Overlay, apply_layer, differences, folder, layers, ops, private_mounts, show, tree, walk, write_layer,
};
use tempfile::TempDir;
use vmctr_images::commit::{Changes, Plan, capture, to_layout};
use vmctr_images::config::{Base, Build, Format};
use vmctr_images::layer::{Compression, LayerOptions};
use vmctr_images::path::TreePath;
use vmctr_images::store::Layout;
use vmctr_images::tree::compare;
use vmctr_images::upper::{Consistency, EntryKind, Namespace, Scope, What};

const OPTIONS: LayerOptions =
    LayerOptions { compression: Compression::Gzip(1), clamp: None, limit: rig::LIMIT };

/// An upper over lowers, made by operations, and what the kernel shows of it.
struct Case<'a> {
    dir: &'a TempDir,
    /// Upper first.
    stack: Vec<PathBuf>,
    overlay: Overlay,
    options: &'a str,
}

/// Builds a base, a lower in overlay form and an upper, each by operations of its own.
fn with_case(
    options: &str,
    stages: &[Vec<ops::Op>],
    check: &dyn Fn(&Case<'_>) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let (first, rest) = stages.split_first().unwrap();
    let base = folder(&dir, "base");
    ops::run(&base, first);
    let mut stack: Vec<PathBuf> = vec![base];
    for (number, stage) in rest.iter().enumerate() {
        let overlay = Overlay::mount(&folder(&dir, &number.to_string()), &stack, options);
        ops::run(&overlay.merged, stage);
        stack.insert(0, overlay.upper.clone());
        if number + 1 == rest.len() {
            check(&Case { dir: &dir, stack: stack.clone(), overlay, options })?;
        }
    }
    Ok(())
}

impl Case<'_> {
    fn same(&self, what: &str, is: &Path) -> Result<(), TestCaseError> {
        let found = rig::without_split_links(differences(is, &self.overlay.merged), &rig::notes(&self.stack));
        prop_assert!(found.is_empty(), "{what}:\n{}", show(&found));
        Ok(())
    }

    /// The base and the changes as two layers, applied by our own reader.
    fn own_reader(&self) -> Result<Vec<u8>, TestCaseError> {
        let (file, plain) = (self.dir.path().join("layer"), folder(self.dir, "plain"));
        for (stack, scope) in [(&self.stack[1..], Scope::Everything), (&self.stack[..], Scope::Changes)] {
            match write_layer(stack, scope, OPTIONS, &file) {
                Ok(info) => apply_layer(&file, &info, &plain),
                Err(error) if format!("{error:?}").contains("Indexed") => {
                    return Err(TestCaseError::reject("an index hides changes"));
                }
                Err(error) => panic!("{error:?}"),
            }
        }
        self.same("applied layers", &plain)?;
        Ok(std::fs::read(&file).unwrap())
    }

    /// The new folder gives the same layer, and the kernel shows the same with it as a lower.
    fn new_folder(&self, layer: &[u8]) -> Result<(), TestCaseError> {
        let new = self.dir.path().join("new");
        let opened = layers(&self.stack);
        let root = TreePath::root();
        let changes = Changes { layers: &opened, scope: Scope::Changes, subtree: &root };
        capture(&changes, Consistency::Frozen, Namespace::Trusted, &new, &mut |_| Ok(())).unwrap();
        let mut stack = self.stack.clone();
        stack[0] = new;
        let file = self.dir.path().join("again");
        write_layer(&stack, Scope::Changes, OPTIONS, &file).unwrap();
        prop_assert!(std::fs::read(&file).unwrap() == layer, "the new folder gives another layer");
        let dir = folder(self.dir, "over");
        // What the overlay adds to a folder that it uses as upper stays out of the comparison.
        let shown = Overlay::mount(&dir, &stack, self.options);
        std::fs::File::open(&shown.upper).unwrap().set_modified(self.root_time()).unwrap();
        self.same("the new folder as a lower", &shown.merged)
    }

    fn root_time(&self) -> std::time::SystemTime {
        self.overlay.merged.metadata().unwrap().modified().unwrap()
    }

    /// Our merged view of the folders against the kernel's.
    fn own_view(&self) -> Result<(), TestCaseError> {
        let (is, should) = (layers(&self.stack), layers(std::slice::from_ref(&self.overlay.merged)));
        let found = compare(tree(&is), tree(&should), 100).unwrap();
        prop_assert!(found.is_empty(), "our merged view:\n{}", show(&found));
        Ok(())
    }

    /// An image of two layers, unpacked by umoci.
    fn umoci(&self) -> Result<(), TestCaseError> {
        let (image, bundle) = (self.dir.path().join("image"), self.dir.path().join("bundle"));
        let build = Build {
            instructions: Vec::new(),
            author: None,
            message: None,
            created: 0,
            format: Format::Oci,
            squash: false,
        };
        let mut base = Base::empty();
        for (stack, scope, tag) in
            [(&self.stack[1..], Scope::Everything, "base"), (&self.stack[..], Scope::Changes, "new")]
        {
            let (layers, root) = (layers(stack), TreePath::root());
            let changes = Changes { layers: &layers, scope, subtree: &root };
            let plan = Plan { changes, layer: OPTIONS, base: &base, build: &build, tag: Some(tag) };
            let made = to_layout(&plan, &image, &mut |_| Ok(None), &mut |_| Ok(())).unwrap();
            assert_eq!(made.missing, []);
            base = Base::parse(&made.image.config, &made.image.manifest).unwrap();
        }
        assert!(Layout::open(&image).unwrap().find(Some("new")).unwrap().is_some());
        let output = Command::new("umoci")
            .args(["unpack", "--image"])
            .arg(format!("{}:new", image.display()))
            .arg(&bundle)
            .output()
            .unwrap();
        prop_assert!(output.status.success(), "umoci: {}", String::from_utf8_lossy(&output.stderr));
        self.same("umoci's rootfs", &bundle.join("rootfs"))
    }

    /// Which statements the layer consists of.
    fn count(&self, seen: &RefCell<BTreeMap<&'static str, u32>>) {
        let layers = layers(&self.stack);
        let mut walk = walk(&layers, Scope::Changes);
        while let Some(change) = walk.next_change().unwrap() {
            let name = match change.what {
                What::Opaque => "opaque",
                What::Whiteout => "whiteout",
                What::Parent(_) => "parent",
                What::Entry(entry) => match entry.kind {
                    EntryKind::Dir => "dir",
                    EntryKind::File(_) => "file",
                    EntryKind::Link(_) => "link",
                    EntryKind::Symlink(_) => "symlink",
                    EntryKind::Fifo => "fifo",
                    EntryKind::Char(_) | EntryKind::Block(_) => "device",
                },
            };
            *seen.borrow_mut().entry(name).or_default() += 1;
        }
    }
}

/// With an index, hard links of lower layers change together, without a trace in the upper folder if the
/// changed name is removed again: such uppers cannot be read.
fn drop_lower_links(stages: &mut [Vec<ops::Op>]) {
    let lowers = stages.len() - 1;
    stages[..lowers].iter_mut().for_each(|stage| stage.retain(|op| !matches!(op, ops::Op::Link(..))));
}

fn property(options: &'static str, cases: u32) {
    private_mounts();
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let stages = (ops::ops(60), ops::ops(30), ops::ops(40)).prop_map(move |(a, b, c)| {
        let mut stages = vec![a, b, c];
        if options.contains("index=on") {
            drop_lower_links(&mut stages);
        }
        stages
    });
    let (seen, number) = (RefCell::new(BTreeMap::new()), RefCell::new(0));
    let check = |case: &Case<'_>| {
        let layer = case.own_reader()?;
        case.new_folder(&layer)?;
        case.own_view()?;
        case.count(&seen);
        *number.borrow_mut() += 1;
        // umoci takes its time.
        if *number.borrow() % 5 == 0 { case.umoci() } else { Ok(()) }
    };
    TestRunner::new(config).run(&stages, |stages| with_case(options, &stages, &check)).unwrap();
    println!("{:?}", seen.borrow());
    // A generator that makes nothing of a kind would prove nothing about it.
    for kind in ["opaque", "whiteout", "parent", "dir", "file", "link", "symlink", "fifo", "device"] {
        assert!(seen.borrow().contains_key(kind), "no {kind} in {:?}", seen.borrow());
    }
}

#[test]
fn as_the_product_mounts_it() {
    property("index=off,redirect_dir=off,metacopy=off", 150);
}

#[test]
fn with_renamed_folders() {
    property("index=off,redirect_dir=on,metacopy=off", 150);
}

#[test]
fn with_renamed_folders_and_metadata_only_copies() {
    property("index=off,redirect_dir=on,metacopy=on", 150);
}

#[test]
fn with_an_index() {
    property("index=on,redirect_dir=on,metacopy=on", 100);
}
