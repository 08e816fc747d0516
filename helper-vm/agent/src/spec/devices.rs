//! Device nodes: only those that mean the same on every Linux kernel.

use libcontainer::oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use super::{Error, Result};

/// Character devices that the kernel makes up itself: (major, minor). Source: Linux's devices.txt.
const SOFTWARE: [(i64, i64); 10] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
];

/// Refuses nodes of the host's hardware.
pub fn check(devices: &[LinuxDevice]) -> Result<()> {
    match devices.iter().find(|device| !is_software(device)) {
        None => Ok(()),
        Some(device) => Err(Error::Refused {
            what: format!("linux.devices: {}", device.path().display()),
            why: "a device node of the host does not exist in the VM",
        }),
    }
}

fn is_software(device: &LinuxDevice) -> bool {
    let character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    device.typ() == LinuxDeviceType::P || character && SOFTWARE.contains(&(device.major(), device.minor()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::LinuxDeviceBuilder;

    fn device(typ: LinuxDeviceType, major: i64, minor: i64) -> LinuxDevice {
        LinuxDeviceBuilder::default().path("/dev/x").typ(typ).major(major).minor(minor).build().unwrap()
    }

    #[test]
    fn only_software_devices_exist_in_the_guest() {
        check(&[device(LinuxDeviceType::C, 1, 3), device(LinuxDeviceType::C, 10, 229)]).unwrap();
        for (typ, major, minor) in
            [(LinuxDeviceType::B, 8, 0), (LinuxDeviceType::B, 1, 3), (LinuxDeviceType::C, 10, 232)]
        {
            let error = check(&[device(typ, major, minor)]).unwrap_err().to_string();
            assert!(error.starts_with("linux.devices: /dev/x"), "{error}");
        }
    }
}
