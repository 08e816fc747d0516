//! Which ports of a VM take a union. Pure; the VM's owner is the only one who asks.
//!
//! ```text
//!   Free ──take()──> Taken ──free()───> Free
//!                      └────spoil()───> Spoilt      its device did not go: until the VM ends
//! ```
//!
//! Invariant: a port is taken by one union at most. A VM with a spoilt port takes no further unions: what kept the
//! device may be in their way, too.

/// How it is with a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Port {
    Free,
    Taken,
    Spoilt,
}

/// The ports of a VM.
#[derive(Debug)]
pub struct Ports(Vec<Port>);

impl Ports {
    /// So many, all free.
    pub fn new(count: u32) -> Self {
        Self((0..count).map(|_| Port::Free).collect())
    }

    /// A port for another union; none: the VM takes no more.
    pub fn take(&mut self) -> Option<u32> {
        if self.0.contains(&Port::Spoilt) {
            return None;
        }
        let free = self.0.iter().position(|port| *port == Port::Free)?;
        self.0[free] = Port::Taken;
        u32::try_from(free).ok()
    }

    /// The union has left its port.
    pub fn free(&mut self, port: u32) {
        self.leave(port, Port::Free);
    }

    /// The union is gone, but its device is not.
    pub fn spoil(&mut self, port: u32) {
        self.leave(port, Port::Spoilt);
    }

    /// How many unions there are.
    pub fn taken(&self) -> usize {
        self.0.iter().filter(|port| **port == Port::Taken).count()
    }

    fn leave(&mut self, port: u32, state: Port) {
        let port = usize::try_from(port).ok().and_then(|port| self.0.get_mut(port));
        port.into_iter().filter(|port| **port == Port::Taken).for_each(|port| *port = state);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_vm_takes_no_more_until_a_union_leaves() {
        let mut ports = Ports::new(2);
        assert_eq!((ports.take(), ports.take(), ports.take()), (Some(0), Some(1), None));
        ports.free(0);
        assert_eq!((ports.taken(), ports.take()), (1, Some(0)));
    }

    #[test]
    fn a_vm_that_keeps_a_device_takes_no_more() {
        let mut ports = Ports::new(3);
        assert_eq!((ports.take(), ports.take()), (Some(0), Some(1)));
        ports.spoil(1);
        assert_eq!((ports.taken(), ports.take()), (1, None));
        ports.free(1);
        ports.free(0);
        assert_eq!((ports.taken(), ports.take()), (0, None));
    }

    proptest! {
        #[test]
        fn no_port_has_two_unions(count in 0u32..10, steps in prop::collection::vec((0u8..3, 0u32..12), 0..60)) {
            let mut ports = Ports::new(count);
            let (mut taken, mut spoilt) = (BTreeSet::new(), false);
            for (step, port) in steps {
                match step {
                    0 => match ports.take() {
                        Some(port) => {
                            prop_assert!(!spoilt && port < count);
                            prop_assert!(taken.insert(port), "port {} is taken twice", port);
                        }
                        None => prop_assert!(spoilt || taken.len() == count as usize),
                    },
                    1 => {
                        ports.free(port);
                        taken.remove(&port);
                    }
                    _ => {
                        ports.spoil(port);
                        spoilt |= taken.remove(&port);
                    }
                }
                prop_assert_eq!(ports.taken(), taken.len());
            }
        }
    }
}
