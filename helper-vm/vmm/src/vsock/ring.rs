//! Between descriptor chains in guest memory and packets: where a header and its data lie.
//!
//! ```text
//!   chain    │ desc 44 │ desc 4096 ······ │ desc 100 │       any split of the bytes over descriptors, header included
//!   packet   │ header  │ data: slices of the rest    │
//! ```
//!
//! The header is copied out once, so the guest cannot change it under our eyes. Data stays in guest memory;
//! it is only ever handed to system calls or copied as bytes.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::packet::{HEADER_LEN, Header};

/// Descriptors of one chain: no more than the largest queue that the device offers may hold. QEMU's own
/// bound is 1024, and QEMU 10.0.13 asks for just that; a device that offers less is cut off.
pub(super) const MAX_DESCRIPTORS: usize = 1024;

/// The guest's ring cannot be used any more; only a reset of its driver mends that.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingError {
    /// The available ring's index or the ring's memory.
    #[error("The guest's available ring is broken")]
    Available(#[source] virtio_queue::Error),
    /// The used ring's memory, or a head that is no descriptor.
    #[error("The guest's used ring is broken")]
    Used(#[source] virtio_queue::Error),
}

/// A chain's buffers cannot hold a packet: too short, too many, or outside of guest memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadChain;

/// Which descriptors of a chain count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Those that the device reads.
    Readable,
    /// Those that the device writes.
    Writable,
}

/// The buffers of one chain, in order.
#[derive(Debug, Default)]
pub(super) struct Buffers<'m>(Vec<VolatileSlice<'m>>);

/// Takes the next chain that the guest made available.
pub(super) fn pop<'m>(
    queue: &mut Queue,
    mem: &'m GuestMemoryMmap,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, RingError> {
    Ok(queue.iter(mem).map_err(RingError::Available)?.next())
}

/// Gives a chain back to the guest with `len` bytes written.
pub(super) fn give_back(
    queue: &mut Queue,
    mem: &GuestMemoryMmap,
    head: u16,
    len: usize,
) -> Result<(), RingError> {
    queue.add_used(mem, head, len as u32).map_err(RingError::Used)
}

impl<'m> Buffers<'m> {
    /// Collects a chain's buffers of one side.
    pub(super) fn gather(
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        mem: &'m GuestMemoryMmap,
        side: Side,
    ) -> Result<Self, BadChain> {
        let mut slices = Vec::new();
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(BadChain);
            }
            if descriptor.is_write_only() != (side == Side::Writable) {
                continue;
            }
            for slice in mem.get_slices(descriptor.addr(), descriptor.len() as usize) {
                slices.push(slice.map_err(|_| BadChain)?);
            }
        }
        Ok(Self(slices))
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// The buffers.
    pub(super) fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.0
    }

    /// Copies the header out; the rest is data.
    pub(super) fn take_header(&mut self) -> Result<Header, BadChain> {
        let mut bytes = [0; HEADER_LEN];
        let mut done = 0;
        for slice in &self.split_off_header()?.0 {
            done += slice.copy_to(&mut bytes[done..]);
        }
        Ok(Header::decode(&bytes))
    }

    /// Cuts the first [`HEADER_LEN`] bytes off.
    pub(super) fn split_off_header(&mut self) -> Result<Self, BadChain> {
        let (head, rest) = self.split(HEADER_LEN)?;
        self.0 = rest;
        Ok(Self(head))
    }

    /// Drops what is beyond `len` bytes.
    pub(super) fn truncate(&mut self, len: usize) -> Result<(), BadChain> {
        self.0 = self.split(len)?.0;
        Ok(())
    }

    /// Writes a header into buffers that [`Self::split_off_header`] gave.
    pub(super) fn write_header(&self, header: &Header) {
        let bytes = header.encode();
        let mut done = 0;
        for slice in &self.0 {
            // Slices of guest memory take any bytes; their lengths sum up to the header's.
            done += slice.write(&bytes[done..], 0).unwrap_or(0);
        }
    }

    fn split(&self, at: usize) -> Result<(Vec<VolatileSlice<'m>>, Vec<VolatileSlice<'m>>), BadChain> {
        let (mut head, mut tail, mut left) = (Vec::new(), Vec::new(), at);
        for slice in &self.0 {
            let cut = left.min(slice.len());
            left -= cut;
            if cut > 0 {
                head.push(slice.subslice(0, cut).map_err(|_| BadChain)?);
            }
            if cut < slice.len() {
                tail.push(slice.offset(cut).map_err(|_| BadChain)?);
            }
        }
        if left == 0 { Ok((head, tail)) } else { Err(BadChain) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn buffers<'m>(chunks: &'m mut [Vec<u8>]) -> Buffers<'m> {
        Buffers(chunks.iter_mut().map(|c| VolatileSlice::from(&mut c[..])).collect())
    }

    fn bytes(buffers: &Buffers<'_>) -> Vec<u8> {
        let mut all = vec![0; buffers.len()];
        let mut done = 0;
        for slice in buffers.slices() {
            done += slice.copy_to(&mut all[done..]);
        }
        all
    }

    fn chunks(whole: &[u8], cuts: &[usize]) -> Vec<Vec<u8>> {
        let (mut rest, mut chunks) = (whole, Vec::new());
        for cut in cuts {
            let (chunk, tail) = rest.split_at((*cut).min(rest.len()));
            chunks.push(chunk.to_vec());
            rest = tail;
        }
        chunks.push(rest.to_vec());
        chunks
    }

    proptest! {
        #[test]
        fn a_packet_is_read_however_it_is_spread(
            whole in proptest::collection::vec(any::<u8>(), HEADER_LEN..300),
            cuts in proptest::collection::vec(0_usize..60, 0..12),
            keep in 0_usize..300,
        ) {
            let mut chunks = chunks(&whole, &cuts);
            let mut buffers = buffers(&mut chunks);
            let header = buffers.take_header().unwrap();
            prop_assert_eq!(&header.encode()[..], &whole[..HEADER_LEN]);
            prop_assert_eq!(bytes(&buffers), &whole[HEADER_LEN..]);
            let data = whole.len() - HEADER_LEN;
            prop_assert_eq!(buffers.truncate(keep).is_ok(), keep <= data);
            let kept = if keep <= data { keep } else { data };
            prop_assert_eq!(bytes(&buffers), &whole[HEADER_LEN..HEADER_LEN + kept]);
        }

        #[test]
        fn a_header_is_written_however_the_space_is_spread(cuts in proptest::collection::vec(0_usize..60, 0..12)) {
            let header = Header { src_port: 7, fwd_cnt: u32::MAX, ..Header::default() };
            let mut chunks = chunks(&[0xee; 100], &cuts);
            let mut space = buffers(&mut chunks);
            space.split_off_header().unwrap().write_header(&header);
            prop_assert_eq!(space.len(), 100 - HEADER_LEN);
            let written = chunks.concat();
            prop_assert_eq!(&written[..HEADER_LEN], &header.encode()[..]);
            prop_assert!(written[HEADER_LEN..].iter().all(|b| *b == 0xee));
        }
    }

    #[test]
    fn a_chain_shorter_than_a_header_is_bad() {
        let mut chunks = vec![vec![0; 20], vec![0; 23]];
        assert_eq!(buffers(&mut chunks).take_header(), Err(BadChain));
    }
}
