//! Devices that come and go while the guest runs.
//!
//! A VM that boots has a vsock device from the start. One that is made into a template has none: everything else
//! is prepared, the agent says so, and there the VM is stopped and saved. Each VM restored from it finds its
//! own devices on the bus when it goes on.
//!
//! ```text
//!   port   on, empty ──host plugs── on, full ──look()── known ──clear()── off ── QEMU takes the device out ── on, empty
//! ```
//!
//! The kernel's own hot-plugging of PCI Express is off: it waits for buttons that nobody presses. What it would do is
//! done here, as the specification of the slot's registers says (PCI Express Base Specification, 7.5.3.10).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmctr_proto::TEMPLATE_POINT;
use vmctr_proto::union_ports::{self, Place};
use vsock::{VMADDR_CID_ANY, get_local_cid};

use crate::boot::console;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Makes the kernel look for devices that it does not know, on all buses.
const RESCAN: &str = "/sys/bus/pci/rescan";

/// Between two looks: short, as a restored VM sleeps through it once, on the average through half of it.
const PAUSE: Duration = Duration::from_millis(4);

/// Returns when the guest has a context ID, so a vsock device that works. A guest that has to wait, as its VM
/// becomes a template, prepares itself first.
pub async fn wait<E: From<io::Error>>(prepare: impl Future<Output = Result<(), E>>) -> Result<(), E> {
    let unions = (0..union_ports::COUNT).map(Place::of_union);
    union_ports::LATE.into_iter().chain(unions).filter_map(Port::at).try_for_each(|port| port.switch_on())?;
    if is_there()? {
        return Ok(());
    }
    prepare.await?;
    console::info(TEMPLATE_POINT);
    loop {
        tokio::time::sleep(PAUSE).await;
        look()?;
        if is_there()? {
            return Ok(());
        }
    }
}

/// Finds a restored VM's own devices; when it returns, their drivers have taken them. Elsewhere than in their ports they
/// can only be where there are no ports.
pub fn look() -> io::Result<()> {
    let ports: Vec<_> = union_ports::LATE.into_iter().filter_map(Port::at).collect();
    if ports.is_empty() {
        return fs::write(RESCAN, "1");
    }
    ports.iter().try_for_each(Port::look)
}

fn is_there() -> io::Result<bool> {
    Ok(get_local_cid()? != VMADDR_CID_ANY)
}

/// A port that takes one device.
#[derive(Debug)]
pub struct Port(PathBuf);

impl Port {
    /// The port at this place, if there is one.
    pub fn at(place: Place) -> Option<Self> {
        let path = Path::new(DEVICES).join(place.address());
        // Only bridges have a bus.
        path.join("pci_bus").is_dir().then_some(Self(path))
    }

    /// Finds a device that was plugged in; when it returns, its driver has taken it.
    pub fn look(&self) -> io::Result<()> {
        fs::write(self.bus()?.join("rescan"), "1")
    }

    /// Lets the device go, and makes QEMU take it out.
    pub fn clear(&self) -> io::Result<()> {
        let name = self.bus()?.file_name().map(|name| name.to_string_lossy().into_owned());
        let device = self.0.join(format!("{}:00.0", name.unwrap_or_default()));
        match fs::write(device.join("remove"), "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.set(|control| control | POWER_OFF | INDICATOR_OFF)?;
        self.switch_on()
    }

    fn switch_on(&self) -> io::Result<()> {
        self.set(|control| (control & !(POWER_OFF | INDICATOR_OFF)) | INDICATOR_ON)
    }

    fn bus(&self) -> io::Result<PathBuf> {
        let mut buses = fs::read_dir(self.0.join("pci_bus"))?;
        Ok(buses.next().ok_or(io::ErrorKind::NotFound)??.path())
    }

    fn set(&self, change: impl Fn(u16) -> u16) -> io::Result<()> {
        let config = File::options().read(true).write(true).open(self.0.join("config"))?;
        let mut space = [0; CONFIG_SPACE];
        config.read_exact_at(&mut space, 0)?;
        let at = slot_control(&space).ok_or_else(|| io::Error::other("the port has no slot"))?;
        let control = u16::from_le_bytes([space[at], space[at + 1]]);
        config.write_all_at(&change(control).to_le_bytes(), at as u64)
    }
}

/// Bits of the slot's control register.
const POWER_OFF: u16 = 1 << 10;
const INDICATOR_OFF: u16 = 3 << 8;
const INDICATOR_ON: u16 = 1 << 8;

/// The part of a device's configuration that all of PCI has.
const CONFIG_SPACE: usize = 256;

/// Where the slot's control register is: in the capability for PCI Express, found along the list of capabilities.
fn slot_control(space: &[u8; CONFIG_SPACE]) -> Option<usize> {
    const LIST: usize = 0x34;
    const PCI_EXPRESS: u8 = 0x10;
    const SLOT_CONTROL: usize = 0x18;
    let mut at = usize::from(space[LIST] & !3);
    // Each has four bytes at least: a longer list runs in a circle.
    for _ in 0..CONFIG_SPACE / 4 {
        match (at, space.get(at)?) {
            (0, _) => return None,
            (_, &PCI_EXPRESS) => return Some(at + SLOT_CONTROL).filter(|at| at + 1 < CONFIG_SPACE),
            _ => at = usize::from(*space.get(at + 1)? & !3),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_slot_is_found_behind_other_capabilities() {
        let mut space = [0; CONFIG_SPACE];
        space[0x34] = 0x54;
        space[0x54..0x56].copy_from_slice(&[0x0d, 0x48]);
        space[0x48..0x4a].copy_from_slice(&[0x10, 0]);
        assert_eq!(slot_control(&space), Some(0x60));
        space[0x49] = 0x54;
        space[0x48] = 5;
        assert_eq!(slot_control(&space), None, "a circle");
        assert_eq!(slot_control(&[0; CONFIG_SPACE]), None);
    }

    proptest! {
        #[test]
        fn any_configuration_is_read_within_its_bounds(space: Vec<u8>) {
            let mut all = [0; CONFIG_SPACE];
            all.iter_mut().zip(space.iter().cycle()).for_each(|(byte, value)| *byte = *value);
            prop_assert!(slot_control(&all).is_none_or(|at| at + 1 < CONFIG_SPACE));
        }
    }
}
