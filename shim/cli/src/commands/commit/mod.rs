//! `vmctr commit CONTAINER [REF]`: a container's changes as an image, a new folder, or both.
//!
//! ```text
//!   prepare ── hold ─┬─ copied to the new snapshot or folder ── let go ── layer ──────────── name
//!                    ├─ layer, from the upper itself ─────────────────────────── let go ── name
//!                    └─ --verify: whichever of the two ── name ── compare ── let go
//! ```
//!
//! Invariants: the container runs on, whatever happens: the shim lets it go when this process ends. An image
//! whose container went on too early gets no name. What was interrupted is taken back.

mod base;
mod interrupt;
mod making;
mod order;
mod report;
mod staging;
mod verifying;

use std::sync::Arc;

use anyhow::anyhow;
use vmctr_images::config::Base;
use vmctr_images::store::containerd::Store;
use vmctr_images::upper::{Layers, Scope};

use super::Context;
use crate::cli::CommitArgs;
use crate::container::{self, Container};
use crate::failure::{Failure, Outcome, Verdict};
use crate::progress::Progress;
use crate::source::Source;
use interrupt::{Interrupt, Wanted, interrupted};
use order::{Image, Order};
use report::Report;

/// Commits.
pub async fn run(context: &Context, args: CommitArgs) -> Outcome {
    let order = Order::of(args)?;
    let client = context.containerd().await?;
    let container = container::find(context, &client, &order.container).await?;
    order::check_root(&container, &order)?;
    let mut interrupt = Interrupt::listen()?;
    let store = Arc::new(match &order.image {
        Some(Image::Containerd(_)) => Store::lease(client, &context.namespace).await?,
        _ => Store::reader(client, &context.namespace),
    });
    let done = tokio::select! {
        done = commit(context, &order, container, &store) => done,
        () = interrupt.asked() => Err(interrupted()),
    };
    let released = tokio::select! {
        released = store.release(done.is_err()) => released,
        // Whoever asks again does not want to wait: the lease ends by itself.
        () = interrupt.asked() => return Err(interrupted()),
    };
    let report = done?;
    released?;
    report.print(context.json, order.quiet)?;
    Ok(if report.differs() { Verdict::Bad } else { Verdict::Good })
}

/// What every step of a commit needs.
struct Work<'a> {
    order: &'a Order,
    store: &'a Arc<Store>,
    source: Source,
    base: Base,
    progress: Progress,
    wanted: Wanted,
    report: Report,
}

async fn commit(
    context: &Context,
    order: &Order,
    container: Container,
    store: &Arc<Store>,
) -> Result<Report, Failure> {
    let base = base::find(store, &container, order).await?;
    let snapshot = staging::prepare(store, &container, &base, order).await?;
    let progress = Progress::begin(order.quiet || context.json);
    progress.phase("stopping the container");
    let source = Source::open(context, container, order.pause).await?;
    check_subtree(&source.layers()?, order)?;
    let mut work =
        Work { order, store, source, base, progress, wanted: Wanted::default(), report: Report::default() };
    let staged = work.stage(snapshot).await?;
    if staged.holds_changes() {
        work.read_all().await?;
    }
    let folder = staged.folder().cloned();
    if let Some(image) = &order.image {
        let made = work.make(image, staged).await?;
        work.report.committed(&made);
        work.verify_image(image, &made).await?;
    } else if let Some(folder) = folder {
        work.verify_folder(folder).await?;
    }
    work.source.still.release().await?;
    work.report.frozen(work.source.still.frozen());
    Ok(work.report)
}

impl Work<'_> {
    /// The changes are not read any more: the container may run on, unless it is to be compared.
    async fn read_all(&self) -> Result<(), Failure> {
        if !self.order.verify {
            self.source.still.release().await?;
        }
        Ok(())
    }
}

/// A name that means nothing would make an image without changes.
fn check_subtree(layers: &Layers, order: &Order) -> Result<(), Failure> {
    let path = &order.subtree;
    let deleted = || Ok::<_, Failure>(order.scope == Scope::Changes && layers.show(1, path)?);
    if layers.show(0, path)? || deleted()? {
        return Ok(());
    }
    Err(Failure::failed(anyhow!("--subtree {path}: the container has no such path, and its image neither")))
}
