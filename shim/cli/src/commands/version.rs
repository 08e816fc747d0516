//! `vmctr version`: what is installed, and which containerd answers.

use serde::Serialize;
use vmctr_proto::PROTOCOL_VERSION;

use super::Context;
use crate::containerd;
use crate::failure::{Outcome, Verdict, one_line};
use crate::output;

#[derive(Serialize)]
struct Versions {
    vmctr: &'static str,
    protocol: u32,
    /// Absent when containerd does not answer; that is no failure of this verb.
    containerd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    containerd_error: Option<String>,
}

/// Prints the versions.
pub async fn run(context: &Context) -> Outcome {
    let versions = versions(containerd::version(&context.address).await);
    if context.json {
        output::json(&versions)?;
    } else {
        output::print_line(&text(versions))?;
    }
    Ok(Verdict::Good)
}

fn versions(containerd: Result<String, containerd::Error>) -> Versions {
    let (containerd, containerd_error) = match containerd {
        Ok(version) => (Some(version), None),
        Err(error) => (None, Some(one_line(&error.into()))),
    };
    Versions { vmctr: env!("CARGO_PKG_VERSION"), protocol: PROTOCOL_VERSION, containerd, containerd_error }
}

fn text(versions: Versions) -> String {
    let containerd = versions.containerd.or(versions.containerd_error).unwrap_or_default();
    output::pairs([
        ("vmctr", versions.vmctr.to_owned()),
        ("agent protocol", versions.protocol.to_string()),
        ("containerd", containerd),
    ])
}
