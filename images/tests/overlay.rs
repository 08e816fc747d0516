//! Random changes in the kernel's overlay, committed and applied again, equal the merged view.

mod rig;

use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rig::{Overlay, apply_layer, differences, folder, ops, private_mounts, show, write_layer};
use vmctr_images::layer::{Compression, LayerOptions};
use vmctr_images::upper::Scope;

/// Builds two lower layers and an upper by operations, commits, applies, compares.
fn round_trip(options: &str, stages: &[Vec<ops::Op>]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let (first, rest) = stages.split_first().unwrap();
    let base = folder(&dir, "base");
    ops::run(&base, first);
    let mut folders: Vec<PathBuf> = vec![base];
    let plain = folder(&dir, "plain");
    for (number, stage) in rest.iter().enumerate() {
        let overlay = Overlay::mount(&folder(&dir, &number.to_string()), &folders, options);
        ops::run(&overlay.merged, stage);
        let mut stack = vec![overlay.upper.clone()];
        stack.extend(folders.iter().cloned());
        if number + 1 == rest.len() {
            check(&dir, &stack, &overlay, &plain)?;
        }
        folders = stack;
    }
    Ok(())
}

fn check(
    dir: &tempfile::TempDir,
    stack: &[PathBuf],
    overlay: &Overlay,
    plain: &std::path::Path,
) -> Result<(), TestCaseError> {
    let file = dir.path().join("layer");
    let options = LayerOptions { compression: Compression::Zstd(1), ..LayerOptions::default() };
    let info = write_layer(&stack[1..], Scope::Everything, options, &file).unwrap();
    apply_layer(&file, &info, plain);
    match write_layer(stack, Scope::Changes, options, &file) {
        Ok(info) => apply_layer(&file, &info, plain),
        Err(error) if format!("{error:?}").contains("Indexed") => {
            return Err(TestCaseError::reject("an index hides changes"));
        }
        Err(error) => panic!("{error:?}"),
    }
    let found = differences(plain, &overlay.merged);
    prop_assert!(found.is_empty(), "\n{}", show(&found));
    Ok(())
}

fn property(options: &'static str, cases: u32) {
    private_mounts();
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let stages = (ops::ops(40), ops::ops(20), ops::ops(20)).prop_map(|(a, b, c)| vec![a, b, c]);
    TestRunner::new(config).run(&stages, |stages| round_trip(options, &stages)).unwrap();
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
