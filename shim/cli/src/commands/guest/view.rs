//! How guest assets are printed.

use std::path::Path;

use serde::Serialize;
use vmctr_proto::manifest::{AssetFile, GuestManifest};

use super::super::Context;
use crate::output;

#[derive(Serialize)]
struct View<'a> {
    dir: &'a Path,
    #[serde(flatten)]
    manifest: &'a GuestManifest,
}

/// Prints the assets in a directory.
pub fn print(context: &Context, dir: &Path, manifest: &GuestManifest) -> anyhow::Result<()> {
    if context.json {
        return output::json(&View { dir, manifest });
    }
    output::print_line(&text(dir, manifest))
}

fn text(dir: &Path, manifest: &GuestManifest) -> String {
    output::pairs([
        ("Directory", dir.display().to_string()),
        ("Kernel", manifest.kernel_release.clone()),
        ("From", manifest.kernel_source.clone()),
        ("Image", file(&manifest.kernel)),
        ("Initramfs", file(&manifest.initramfs)),
        ("Agent", manifest.agent_version.clone()),
        ("Modules", manifest.modules.join(" ")),
        ("Hard links", hard_links(manifest.hard_links).to_owned()),
    ])
}

fn hard_links(work: bool) -> &'static str {
    if work {
        "work on shares (overlay changed)"
    } else {
        "fail with ESTALE on shares once one of a file's names is removed: this kernel's overlay is not known"
    }
}

fn file(asset: &AssetFile) -> String {
    format!("{}, {}, sha256 {}", asset.file, output::bytes(asset.size), asset.sha256)
}
