//! `vmctr guest`: what the VMs boot.

mod build;
mod info;
mod package;
mod view;

use super::Context;
use crate::cli::GuestVerb;
use crate::failure::Outcome;

/// Does what the verb says.
pub fn run(context: &Context, verb: GuestVerb) -> Outcome {
    match verb {
        GuestVerb::Build(args) => build::run(context, args),
        GuestVerb::Info(args) => info::run(context, args),
    }
}
