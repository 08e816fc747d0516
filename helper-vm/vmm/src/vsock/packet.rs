//! The packet header of virtio-vsock (virtio 1.2, section 5.10.6) and the names of what stands in it.
//!
//! ```text
//!   0        8        16       20       24    28     30   32      36          40
//!   │src_cid │dst_cid │src_port│dst_port│ len │ type │ op │ flags │ buf_alloc │ fwd_cnt │   44 bytes, little-endian
//! ```
//!
//! Decoding accepts any 44 bytes: what a field may hold is judged where it is used, because most wrong
//! values must be answered and not just refused.

use std::ops::{BitOr, BitOrAssign};

use vmctr_proto::GuestCid;

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = 44;

/// The host's context ID.
pub(super) const HOST_CID: u64 = 2;

/// Stream sockets: the only type that the device offers.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet asks or tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Open a connection.
    Request = 1,
    /// The connection is open.
    Response = 2,
    /// The connection is gone, or never was.
    Reset = 3,
    /// The sender is done with the directions in `flags`.
    Shutdown = 4,
    /// `len` bytes follow.
    Data = 5,
    /// Nothing but fresh `buf_alloc` and `fwd_cnt`.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    fn from_raw(raw: u16) -> Option<Self> {
        const ALL: [Op; 7] = [
            Op::Request,
            Op::Response,
            Op::Reset,
            Op::Shutdown,
            Op::Data,
            Op::CreditUpdate,
            Op::CreditRequest,
        ];
        ALL.into_iter().find(|op| *op as u16 == raw)
    }
}

/// Directions that the sender of a SHUTDOWN is done with, as in its `flags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Directions(u32);

impl Directions {
    /// The sender takes no more data.
    pub(super) const RECEIVE: Self = Self(1);
    /// The sender sends no more data.
    pub(super) const SEND: Self = Self(2);
    /// Both.
    pub(super) const BOTH: Self = Self(3);

    /// The directions in a header's flags; unknown bits mean nothing.
    pub(super) fn from_flags(flags: u32) -> Self {
        Self(flags & Self::BOTH.0)
    }

    pub(super) fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub(super) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn flags(self) -> u32 {
        self.0
    }
}

impl BitOr for Directions {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Directions {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

/// What identifies a connection: the guest (of which a device has one) and a port on either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Route {
    /// Whose guest port it is.
    pub(super) guest: GuestCid,
    /// Port in the guest.
    pub(super) guest_port: u32,
    /// Port on the host.
    pub(super) host_port: u32,
}

/// A header, in the order of its fields on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// A packet from host to guest without data, flags or credit.
    pub(super) fn to_guest(route: Route, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: u32::from(route.guest).into(),
            src_port: route.host_port,
            dst_port: route.guest_port,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Self::default()
        }
    }

    /// The operation, unless the number means none.
    pub(super) fn op(&self) -> Option<Op> {
        Op::from_raw(self.op)
    }

    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_is_laid_out_as_the_standard_says() {
        let route = Route { guest: GuestCid::DEFAULT, guest_port: 0x0102_0304, host_port: 0x1112_1314 };
        let mut header = Header::to_guest(route, Op::Data);
        header.len = 0x2122_2324;
        header.flags = 3;
        header.buf_alloc = 0x3132_3334;
        header.fwd_cnt = 0x4142_4344;
        let expected = [
            2, 0, 0, 0, 0, 0, 0, 0, // src_cid
            3, 0, 0, 0, 0, 0, 0, 0, // dst_cid
            0x14, 0x13, 0x12, 0x11, 0x04, 0x03, 0x02, 0x01, // ports
            0x24, 0x23, 0x22, 0x21, // len
            1, 0, 5, 0, // type, op
            3, 0, 0, 0, // flags
            0x34, 0x33, 0x32, 0x31, 0x44, 0x43, 0x42, 0x41, // credit
        ];
        assert_eq!(header.encode(), expected);
    }

    #[test]
    fn numbers_outside_the_standard_are_no_operation() {
        for raw in [0, 8, u16::MAX] {
            assert_eq!(Op::from_raw(raw), None);
        }
        assert_eq!(Op::from_raw(7), Some(Op::CreditRequest));
    }

    #[test]
    fn unknown_shutdown_flags_are_dropped() {
        assert!(Directions::from_flags(0xffff_fffc).is_empty());
        assert_eq!(Directions::from_flags(u32::MAX), Directions::BOTH);
        assert_eq!(Directions::BOTH.without(Directions::SEND), Directions::RECEIVE);
    }

    proptest! {
        #[test]
        fn any_bytes_survive_decoding_and_encoding(raw in proptest::collection::vec(any::<u8>(), HEADER_LEN)) {
            let bytes: [u8; HEADER_LEN] = raw.try_into().unwrap();
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }
}
