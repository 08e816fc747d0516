//! `vmctr layer ls|verify FILE|REF`: what is in a layer, and whether it is what its digest says.

use std::fs::File;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;
use tokio::task::spawn_blocking;
use vmctr_images::layer::{Checked, Item, ItemKind, LayerReader};

use super::Context;
use crate::cli::{LayerArgs, LayerVerb};
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;

/// No layer has more bytes.
const LIMIT: u64 = 1 << 50;

pub async fn run(context: &Context, verb: LayerVerb) -> Outcome {
    todo!()
}
