//! `vmctr guest info`: the guest assets in use, and whether they still are what was built.

use vmctr_guest::InspectError;
use vmctr_vmm::assets::{AssetError, GuestAssets};

use super::super::{Context, config};
use super::view;
use crate::cli::GuestInfo;
use crate::failure::{Failure, Outcome, Verdict, one_line};

/// Prints the assets of the directory named, else of the one that VMs boot from.
pub fn run(context: &Context, args: GuestInfo) -> Outcome {
    let dir = match args.dir {
        Some(dir) => dir,
        None => match GuestAssets::find(&config()?) {
            Ok(assets) => assets.dir().to_owned(),
            Err(error @ AssetError::Missing { .. }) => return Err(Failure::not_found(error)),
            Err(error) => return Ok(damaged(error)),
        },
    };
    match vmctr_guest::inspect(&dir) {
        Ok(manifest) => {
            view::print(context, &dir, &manifest)?;
            Ok(Verdict::Good)
        }
        Err(error @ InspectError::NoManifest { .. }) => Err(Failure::not_found(error)),
        Err(error) => Ok(damaged(error)),
    }
}

/// The answer is that the files are not good; it is printed where errors are.
fn damaged(error: impl Into<anyhow::Error>) -> Verdict {
    eprintln!("vmctr: {}", one_line(&error.into()));
    Verdict::Bad
}
