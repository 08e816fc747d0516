//! The ports of a VM that take the shares of unions while it runs: where QEMU puts them on the PCI Express bus, and where
//! the agent finds them.
//!
//! ```text
//!   bus 0 ─┬ 01   balloon
//!          ├ 02   port for the vsock device of a restored VM
//!          ├ 03   port for its share
//!          └ 06.0 … 06.7   port 0 … 7 for unions
//! ```
//!
//! They are functions of one device, and of this one: a guest without ACPI takes interrupts from a table of the firmware
//! that is right for the second, third and sixth device only.
//!
//! Only a PCI Express machine has them. Another has one union, for as long as it lives.

/// How many there are: the functions that one device has.
pub const COUNT: u32 = 8;

/// Device number and function on the first bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Device.
    pub device: u32,
    /// Function.
    pub function: u32,
}

/// The ports for a restored VM's own devices: vsock, share.
pub const LATE: [Place; 2] = [Place { device: 2, function: 0 }, Place { device: 3, function: 0 }];

impl Place {
    /// The place of a union's port.
    #[must_use]
    pub const fn of_union(port: u32) -> Self {
        Self { device: 6, function: port }
    }

    /// The kernel's name for what is there.
    #[must_use]
    pub fn address(self) -> String {
        format!("0000:00:{:02x}.{}", self.device, self.function)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_have_places_of_their_own() {
        let mut all: Vec<_> = (0..COUNT).map(Place::of_union).chain(LATE).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), COUNT as usize + LATE.len());
        assert!(all.iter().all(|place| (2..=6).contains(&place.device) && place.function < 8));
        assert_eq!(Place::of_union(1).address(), "0000:00:06.1");
        assert_eq!(LATE[0].address(), "0000:00:02.0");
    }
}
