//! The guest's first root file system.
//!
//! ```text
//!   /init              the agent, PID 1
//!   /dev/console       what the kernel opens as stdin, stdout and stderr of /init
//!   /modules/order     module names, one per line, dependencies first
//!   /modules/NAME.ko   unpacked
//!   /dev /proc /run /sys /tmp    mount points
//! ```
//!
//! It stays uncompressed: unpacking costs more guest time than the bytes saved.

use crate::cpio::{Archive, CpioError, Device};
use crate::modules::Module;

/// Device number of `/dev/console`. Source: the kernel's `Documentation/admin-guide/devices.txt`.
const CONSOLE: Device = Device { major: 5, minor: 1 };

/// The archive that holds the agent and the modules.
pub fn pack(agent: &[u8], modules: &[Module]) -> Result<Vec<u8>, CpioError> {
    let mut archive = Archive::default();
    for directory in ["dev", "modules", "proc", "run", "sys"] {
        archive.directory(directory, 0o755);
    }
    archive.directory("tmp", 0o1777);
    archive.char_device("dev/console", 0o600, CONSOLE);
    archive.file("init", 0o755, agent)?;
    archive.file("modules/order", 0o644, load_order(modules).as_bytes())?;
    for module in modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.image)?;
    }
    Ok(archive.finish())
}

fn load_order(modules: &[Module]) -> String {
    modules.iter().map(|module| format!("{}\n", module.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::testing::read;

    #[test]
    fn the_archive_holds_the_agent_and_the_modules_in_order() {
        let module = |name: &str, image: &[u8]| Module {
            name: name.to_owned(),
            image: image.to_vec(),
            trusts_names: false,
        };
        let archive = pack(b"agent", &[module("vsock", b"v"), module("overlay", b"o")]).unwrap();
        let entries = read(&archive);
        let content = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap().data.clone();
        assert_eq!(content("init"), b"agent");
        assert_eq!(content("modules/order"), b"vsock\noverlay\n");
        assert_eq!(content("modules/overlay.ko"), b"o");

        let console = entries.iter().find(|entry| entry.name == "dev/console").unwrap();
        assert_eq!((console.mode, console.device), (0o020_600, (5, 1)));
    }

    #[test]
    fn parents_come_before_their_children() {
        let entries = read(&pack(b"", &[]).unwrap());
        for (index, entry) in entries.iter().enumerate() {
            let Some((parent, _)) = entry.name.rsplit_once('/') else { continue };
            assert!(entries[..index].iter().any(|earlier| earlier.name == parent), "{}", entry.name);
        }
    }
}
