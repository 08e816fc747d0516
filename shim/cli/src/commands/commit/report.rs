//! What a commit tells: the image and the folder on stdout, what was left out on stderr.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use vmctr_images::commit::Committed;
use vmctr_images::path::TreePath;
use vmctr_images::tree::Difference;
use vmctr_images::upper::Notes;

use crate::output;

/// All that happened.
#[derive(Default)]
pub struct Report {
    /// How long the container stood still.
    pause: Option<Duration>,
    image: Option<Image>,
    folder: Option<(PathBuf, u64)>,
    warnings: Vec<String>,
    /// How the image differs from the container, once compared.
    differences: Option<Vec<String>>,
}

#[derive(Clone, Serialize)]
struct Image {
    digest: String,
    layer: String,
    diff_id: String,
    size_bytes: u64,
    uncompressed_bytes: u64,
    entries: u64,
    compression: String,
}

/// As JSON: the names are part of the CLI's contract.
#[derive(Serialize)]
struct View<'a> {
    #[serde(flatten)]
    image: Option<&'a Image>,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder_entries: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_micros: Option<u64>,
    warnings: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    verified: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    differences: Option<&'a [String]>,
}

impl Report {
    /// An image was made.
    pub fn committed(&mut self, made: &Committed) {
        let layer = &made.layer;
        self.image = Some(Image {
            digest: made.image.manifest_descriptor.digest.to_string(),
            layer: layer.digest.to_string(),
            diff_id: layer.diff_id.to_string(),
            size_bytes: layer.size,
            uncompressed_bytes: layer.totals.bytes,
            entries: layer.totals.entries,
            compression: layer.compression.to_string(),
        });
        self.notes(&made.notes);
        for blob in &made.missing {
            let digest = blob.digest;
            self.warnings.push(format!("base layer {digest} is not in containerd: the image lacks it"));
        }
    }

    /// A folder was filled.
    pub fn folder(&mut self, dir: &Path, entries: u64) {
        self.folder = Some((dir.to_owned(), entries));
    }

    /// The container stood still so long.
    pub fn frozen(&mut self, time: Duration) {
        self.pause = Some(time).filter(|time| !time.is_zero());
    }

    /// The stored layer is not what was written.
    pub fn damaged(&mut self) {
        self.differences.get_or_insert_default().push("the stored layer has another digest".to_owned());
    }

    /// The image was compared with the container.
    pub fn compared(&mut self, found: &[Difference]) {
        self.differences.get_or_insert_default().extend(found.iter().map(ToString::to_string));
    }

    /// Whether a comparison found something.
    pub fn differs(&self) -> bool {
        self.differences.as_ref().is_some_and(|differences| !differences.is_empty())
    }

    /// Something was left out. What was copied first is read twice, but noted once.
    pub fn notes(&mut self, notes: &Notes) {
        let mut warnings: Vec<_> = notes.kept.iter().map(ToString::to_string).collect();
        warnings.retain(|warning| !self.warnings.contains(warning));
        self.warnings.append(&mut warnings);
        if notes.more > 0 {
            self.warnings.push(format!("and {} more", notes.more));
        }
    }

    /// Files did not stand still.
    pub fn changed(&mut self, files: &[TreePath]) {
        let changed = |path| format!("{path} changed while it was read: its copy may be torn");
        self.warnings.extend(files.iter().map(changed));
    }

    /// Prints it.
    pub fn print(&self, json: bool, quiet: bool) -> anyhow::Result<()> {
        if json {
            return output::json(&self.view());
        }
        self.warnings.iter().for_each(|warning| eprintln!("vmctr: warning: {warning}"));
        self.differences.iter().flatten().for_each(|difference| eprintln!("vmctr: differs: {difference}"));
        match &self.image {
            Some(image) if quiet => output::print_line(&image.digest),
            _ if quiet => Ok(()),
            _ => output::print_line(&self.text()),
        }
    }

    fn view(&self) -> View<'_> {
        View {
            image: self.image.as_ref(),
            folder: self.folder.as_ref().map(|(dir, _)| dir.display().to_string()),
            folder_entries: self.folder.as_ref().map(|(_, entries)| *entries),
            pause_micros: self.pause.map(|pause| u64::try_from(pause.as_micros()).unwrap_or(u64::MAX)),
            warnings: &self.warnings,
            verified: self.differences.as_ref().map(Vec::is_empty),
            differences: self.differences.as_deref(),
        }
    }

    fn text(&self) -> String {
        let mut rows = vec![];
        if let Some(image) = &self.image {
            let size = output::bytes(image.size_bytes);
            let plain = output::bytes(image.uncompressed_bytes);
            rows.push(("Image", image.digest.clone()));
            rows.push(("Layer", image.layer.clone()));
            rows.push(("Size", format!("{size} ({plain} before {})", image.compression)));
            rows.push(("Entries", image.entries.to_string()));
        }
        if let Some((dir, entries)) = &self.folder {
            rows.push(("Folder", format!("{} ({entries} entries)", dir.display())));
        }
        if let Some(pause) = self.pause {
            rows.push(("Pause", format!("{:.3} s", pause.as_secs_f64())));
        }
        match &self.differences {
            None => {}
            Some(found) if found.is_empty() => rows.push(("Verified", "yes".to_owned())),
            Some(found) => rows.push(("Verified", format!("no: {} differences", found.len()))),
        }
        output::pairs(rows)
    }
}
