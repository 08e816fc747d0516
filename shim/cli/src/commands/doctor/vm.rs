//! Checks of what a VM is made of: the helper binaries, QEMU, the guest assets, the accelerator.

use vmctr_vmm::accel::{self, Accelerator};
use vmctr_vmm::assets::GuestAssets;
use vmctr_vmm::binaries;
use vmctr_vmm::config::Config;
use vmctr_vmm::qemu::Qemu;

use super::report::Check;
use crate::failure::one_line;

/// What the shim starts.
const HELPERS: [&str; 2] = ["vmctr-jail", "vmctr-fsd"];

/// The helper binaries are where the shim looks for them, provided that it is installed beside this program.
pub fn binaries() -> Check {
    let name = "binaries";
    let missing: Vec<_> = HELPERS.into_iter().filter_map(|helper| binaries::find(helper).err()).collect();
    if missing.is_empty() {
        return Check::ok(name, HELPERS.join(" and "));
    }
    let missing: Vec<_> = missing.into_iter().map(|error| one_line(&error.into())).collect();
    Check::fail(name, missing.join("; "), "make install")
}

/// A QEMU that is new enough.
pub fn qemu(config: &Config) -> (Check, Option<Qemu>) {
    let name = "QEMU";
    match Qemu::find(config) {
        Ok(qemu) => {
            let detail = format!("{} at {}", qemu.version(), qemu.path().display());
            (Check::ok(name, detail), Some(qemu))
        }
        Err(error) => {
            let fix = "apt-get install qemu-system-x86 (on Debian 12: -t bookworm-backports)";
            (Check::error(name, error, fix), None)
        }
    }
}

/// Guest assets that are what was built, byte for byte.
pub fn assets(config: &Config) -> (Check, Option<GuestAssets>) {
    let found = GuestAssets::find(config).and_then(|assets| assets.verify().map(|()| assets));
    match found {
        Ok(assets) => {
            let detail = format!("kernel {} in {}", assets.manifest().kernel_release, assets.dir().display());
            (Check::ok("guest", detail), Some(assets))
        }
        Err(error) => (Check::error("guest", error, "vmctr guest build --out /usr/share/vmctr/guest"), None),
    }
}

/// KVM, if it boots the guest; else TCG, with which containers run slower.
pub async fn accelerator(config: &Config, qemu: Option<&Qemu>, assets: Option<&GuestAssets>) -> Check {
    let name = "accelerator";
    let (Some(qemu), Some(assets)) = (qemu, assets) else {
        return Check::fail(name, "cannot be tried without QEMU and a guest", "see QEMU and guest");
    };
    match accel::resolve(config, assets, qemu).await {
        Ok(found) if found.accelerator == Accelerator::Kvm => {
            Check::ok(name, format!("kvm: {}", found.reason))
        }
        Ok(found) => Check::warn(
            name,
            format!("tcg, so guests run some 10 to 20 times slower than with kvm: {}", found.reason),
            "enable virtualisation in the firmware, or nested virtualisation where this host is itself a VM",
        ),
        Err(error) => Check::error(name, error, "run as root"),
    }
}
