//! `-v` and `-info`: what this runtime is, without a container.

use std::io::{Write, stdout};

use anyhow::{Context, Result};
use containerd_shim::protos::protobuf::{Message, MessageField};
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};

/// Name of the runtime as containerd's configuration writes it.
pub const RUNTIME: &str = "io.containerd.vmctr.v2";

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Tells which versions of the protocol to the guest's agent this build speaks.
const PROTOCOL_ANNOTATION: &str = "io.vmctr.agent-protocol";

/// Prints the version for people.
pub fn print_version() -> Result<()> {
    writeln!(stdout(), "containerd-shim-vmctr-v2 {VERSION}").context("write the version")
}

/// Prints what containerd 2.x asks for: a protobuf message. The options on standard input concern the runtime
/// `runc`, not this one.
pub fn print_info() -> Result<()> {
    let message = info().write_to_bytes().context("encode the runtime's information")?;
    stdout().write_all(&message).context("write the runtime's information")
}

fn info() -> RuntimeInfo {
    let protocol = format!("{}-{}", vmctr_proto::PROTOCOL_VERSION_MIN, vmctr_proto::PROTOCOL_VERSION);
    RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: VERSION.to_owned(),
            ..RuntimeVersion::default()
        }),
        annotations: [(PROTOCOL_ANNOTATION.to_owned(), protocol)].into(),
        ..RuntimeInfo::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_names_itself() {
        let info = RuntimeInfo::parse_from_bytes(&info().write_to_bytes().unwrap()).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), (RUNTIME, VERSION));
        assert_eq!(info.annotations[PROTOCOL_ANNOTATION], "2-2");
    }
}
