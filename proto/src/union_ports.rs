//! The ports of a VM that take the shares of unions while it runs: where QEMU puts them on the PCI Express bus, and where
//! the agent finds them.
//!
//! ```text
//!   bus 0 ─┬ 01   balloon
//!          ├ 02   port for the vsock device of a restored VM
//!          ├ 03   port for its share
//!          └ 10 … 17   port 0 … 7 for unions
//! ```
//!
//! Only a PCI Express machine has them. Another has one union, for as long as it lives.

/// How many there are. An empty one costs the guest's kernel 20 KiB and nothing else; that many unions fit in a VM of
/// the usual size.
pub const COUNT: u32 = 8;

/// Device numbers on the first bus of the ports for a restored VM's own devices: vsock, share.
pub const LATE: [u32; 2] = [2, 3];

const FIRST: u32 = 0x10;

/// Device number of a port on the first bus.
#[must_use]
pub fn device(port: u32) -> u32 {
    FIRST + port
}

/// The kernel's name for a device on the first bus.
#[must_use]
pub fn address(device: u32) -> String {
    format!("0000:00:{device:02x}.0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_have_places_of_their_own() {
        let mut all: Vec<_> = (0..COUNT).map(device).chain(LATE).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), COUNT as usize + LATE.len());
        // 0x1f is the machine's own, and the last.
        assert!(all.iter().all(|device| (1..0x1f).contains(device)));
        assert_eq!(address(device(1)), "0000:00:11.0");
        assert_eq!(address(LATE[0]), "0000:00:02.0");
    }
}
