//! End-to-end tests and benchmarks: they use the built binaries through stock containerd, and none of the crates.
//!
//! ```text
//!   src/rig/     private containerd, images, `ctr`, events, terminals; proves that nothing is left
//!   src/bin/     programs that tests put into a guest, and the benchmark
//!   tests/       the cases, named by what a user would see
//! ```

pub mod rig;

/// Makes each case a test twice: under runc, which proves the case and the rig, and under vmctr.
#[macro_export]
macro_rules! under_both_runtimes {
    ($($case:ident),+ $(,)?) => {
        mod runc {
            $(#[test] fn $case() { super::$case(&mut vmctr_tests::rig::Rig::runc()); })+
        }
        mod vmctr {
            $(#[test] fn $case() { super::$case(&mut vmctr_tests::rig::Rig::vmctr()); })+
        }
    };
}
