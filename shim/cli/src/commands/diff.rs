//! `vmctr diff CONTAINER`: what a container changed, path by path.

use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;
use tokio::task::spawn_blocking;
use vmctr_images::path::TreePath;
use vmctr_images::upper::{Scope, Status, Walk, diff};

use super::Context;
use crate::container;
use crate::failure::{Failure, Outcome, Verdict};
use crate::output;
use crate::source::Source;

/// One changed path.
#[derive(Serialize)]
struct Line {
    /// `A`, `C` or `D`.
    change: String,
    /// Bytes that are no text are escaped as `\xNN`.
    path: String,
}

/// Prints the changes.
pub async fn run(context: &Context, id: &str) -> Outcome {
    let client = context.containerd().await?;
    let container = container::find(context, &client, id).await?;
    let source = Source::open(context, container, true).await?;
    if source.scope == Scope::Everything {
        return Err(one_folder(id));
    }
    let still = source.still.clone();
    let lines = spawn_blocking(move || changes(&source)).await.context("reading was interrupted")??;
    still.release().await?;
    if context.json {
        output::json(&lines)?;
    } else if !lines.is_empty() {
        output::print_line(&text(&lines))?;
    }
    Ok(Verdict::Good)
}

/// A root of one folder has no base to compare with.
pub fn one_folder(id: &str) -> Failure {
    let error = anyhow::anyhow!(
        "The root of container {id} is one folder: what it changed cannot be told from what was there"
    );
    Failure::failed(error).hint(
        "containers of the overlayfs snapshotter, and of `ctr run --rootfs` with the annotation \
         io.vmctr.upper-dir=DIR, keep their changes apart",
    )
}

fn changes(source: &Source) -> Result<Vec<Line>, Failure> {
    let layers = source.layers()?;
    let mut walk = Walk::new(&layers, source.scope, source.consistency, TreePath::root())?;
    let mut lines = vec![];
    diff(&mut walk, &mut |status, path| lines.push(line(status, path)))?;
    Ok(lines)
}

fn line(status: Status, path: &TreePath) -> Line {
    Line { change: status.to_string(), path: shown(path) }
}

fn shown(path: &TreePath) -> String {
    let path = Path::new(std::ffi::OsStr::from_bytes(path.as_bytes()));
    let mut text = String::from("/");
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        chunk.valid().chars().for_each(|char| match char.is_control() || char == '\\' {
            true => text.extend(char.escape_default()),
            false => text.push(char),
        });
        for byte in chunk.invalid() {
            // Writing to a string does not fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

fn text(lines: &[Line]) -> String {
    let lines: Vec<_> = lines.iter().map(|line| format!("{} {}", line.change, line.path)).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_printable_and_stay_apart() {
        let shown = |bytes: &[u8]| shown(&TreePath::parse(bytes).unwrap());
        assert_eq!(shown("a/ä b".as_bytes()), "/a/ä b");
        assert_eq!(shown(b"a\nb\xff\\"), "/a\\nb\\xff\\\\");
    }
}
