//! The engine on rings in memory: packets of every shape, a guest that takes nothing, broken rings, pauses
//! and resets.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmctr_proto::GuestCid;

use super::driver::{Driver, MEMORY, RING, SLOT};
use super::peer::{LISTENED, from_guest};
use crate::vsock::engine::Served;
use crate::vsock::mux::MAX_RESETS;
use crate::vsock::packet::{HEADER_LEN, Header, Op, Route};
use crate::vsock::ring::MAX_DESCRIPTORS;

const WHOLE: [u32; 1] = [SLOT as u32];

fn packet(op: Op) -> Header {
    let route = Route { guest: GuestCid::DEFAULT, guest_port: 5, host_port: LISTENED };
    Header { buf_alloc: 1 << 20, ..from_guest(route, op) }
}

async fn connected(driver: &mut Driver) -> UnixStream {
    driver.send(&packet(Op::Request), &[], &[]);
    driver.offer_space(&WHOLE);
    assert_eq!(driver.serve(), Served::Idle);
    assert_eq!(ops(&driver.received(&WHOLE)), [Op::Response]);
    driver.listener.accept().await.unwrap().into_std().unwrap()
}

fn ops(packets: &[(Header, Vec<u8>)]) -> Vec<Op> {
    packets.iter().map(|(header, _)| header.op().unwrap()).collect()
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn a_packet_may_be_spread_over_descriptors_in_both_directions() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    let data: Vec<u8> = (0..3000).map(|i| (i % 251) as u8).collect();
    driver.send(&Header { len: 3000, ..packet(Op::Data) }, &data, &[10, 0, 40, 1000]);
    driver.serve();
    assert_eq!(read(&mut stream, 3000), data);
    let lengths = [7, 0, 50, 900, 4096];
    driver.offer_space(&lengths);
    stream.write_all(&data).unwrap();
    driver.serve();
    let received = driver.received(&lengths);
    assert_eq!((ops(&received), &received[0].1), (vec![Op::Data], &data));
}

#[tokio::test]
async fn data_beyond_the_headers_length_is_ignored() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    driver.send(&Header { len: 3, ..packet(Op::Data) }, b"yes and more", &[]);
    driver.serve();
    assert_eq!(stream.read(&mut [0; 99]).unwrap(), 3);
}

#[tokio::test]
async fn a_length_beyond_the_buffers_ends_the_connection() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    driver.send(&Header { len: 100, ..packet(Op::Data) }, b"short", &[]);
    driver.offer_space(&WHOLE);
    driver.serve();
    assert_eq!(ops(&driver.received(&WHOLE)), [Op::Reset]);
    assert_eq!(stream.read(&mut [0; 99]).unwrap(), 0);
}

#[tokio::test]
async fn chains_that_hold_no_packet_are_dropped_and_others_go_on() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    let memory = driver.memory.memory();
    driver.tx.offer(&memory, &[(0x10_000, HEADER_LEN as u32 - 1)], false);
    driver.tx.offer(&memory, &[(MEMORY - 10, HEADER_LEN as u32)], false);
    driver.tx.offer(&memory, &[(u64::MAX - 3, u32::MAX)], false);
    driver.tx.offer(&memory, &[(0x10_000, 100)], true);
    driver.send(&Header { len: 4, ..packet(Op::Data) }, b"good", &[]);
    driver.serve();
    assert_eq!(read(&mut stream, 4), b"good");
    assert_eq!(driver.tx.take_used(&memory).len(), 6);
}

#[tokio::test]
async fn buffers_that_hold_no_packet_come_back_empty_and_the_packet_takes_the_next() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    stream.write_all(b"data").unwrap();
    let memory = driver.memory.memory();
    driver.offer_space(&[HEADER_LEN as u32 - 1]);
    driver.offer_space(&[HEADER_LEN as u32]);
    driver.rx.offer(&memory, &[(MEMORY, 500)], true);
    driver.rx.offer(&memory, &[(0x40_000, 500)], false);
    let good = driver.offer_space(&WHOLE);
    assert_eq!(driver.serve(), Served::Idle);
    let back = driver.rx.take_used(&memory);
    assert_eq!(back.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [0, 0, 0, 0, HEADER_LEN as u32 + 4]);
    assert_eq!(back[4].0, u32::from(good));
}

#[tokio::test]
async fn a_packet_may_lie_in_an_indirect_table_but_not_in_an_endless_one() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    driver.send_indirect(&Header { len: 100, ..packet(Op::Data) }, &[7; 100]);
    driver.serve();
    assert_eq!(read(&mut stream, 100), [7; 100]);
    let endless = [8; MAX_DESCRIPTORS];
    driver.send_indirect(&Header { len: MAX_DESCRIPTORS as u32, ..packet(Op::Data) }, &endless);
    driver.send(&Header { len: 1, ..packet(Op::Data) }, &[9], &[]);
    driver.serve();
    assert_eq!(read(&mut stream, 1), [9]);
}

#[tokio::test]
async fn a_descriptor_loop_ends() {
    let mut driver = Driver::new();
    let memory = driver.memory.memory();
    driver.tx.write_descriptor(&memory, 0, (0x10_000, 1), 1, 0);
    driver.tx.publish(&memory, 0);
    assert_eq!(driver.serve(), Served::Idle);
    assert_eq!(driver.tx.take_used(&memory), [(0, 0)]);
}

#[tokio::test]
async fn a_guest_that_takes_no_resets_is_left_waiting_and_served_when_it_does() {
    let mut driver = Driver::new();
    let memory = driver.memory.memory();
    let mut taken = 0;
    for port in 0..MAX_RESETS as u32 + 20 {
        driver.send(&Header { src_port: port, ..packet(Op::Data) }, &[], &[]);
        driver.serve();
        taken += driver.tx.take_used(&memory).len();
        if driver.engine.mux.takes_packets() {
            continue;
        }
        break;
    }
    assert_eq!(taken, MAX_RESETS);
    driver.send(&packet(Op::Data), &[], &[]);
    assert_eq!(driver.serve(), Served::Idle);
    assert!(driver.tx.take_used(&memory).is_empty());
    driver.offer_space(&WHOLE);
    driver.serve();
    assert_eq!(driver.tx.take_used(&memory).len(), 1);
    assert_eq!(ops(&driver.received(&WHOLE)), [Op::Reset]);
}

#[tokio::test]
async fn a_jump_of_the_available_ring_closes_all_until_the_driver_is_reset() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    let memory = driver.memory.memory();
    driver.tx.set_available(&memory, 1000);
    assert_eq!(driver.serve(), Served::Idle);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    driver.send(&packet(Op::Request), &[], &[]);
    assert_eq!(driver.serve(), Served::Idle);
    assert_eq!(driver.engine.mux.live(), 0);
    driver.reset();
    let mut stream = connected(&mut driver).await;
    driver.send(&Header { len: 2, ..packet(Op::Data) }, b"ok", &[]);
    driver.serve();
    assert_eq!(read(&mut stream, 2), b"ok");
}

#[tokio::test]
async fn a_head_that_is_no_descriptor_closes_all() {
    let mut driver = Driver::new();
    let _stream = connected(&mut driver).await;
    let memory = driver.memory.memory();
    driver.tx.publish(&memory, RING + 1);
    assert_eq!(driver.serve(), Served::Idle);
    assert_eq!(driver.engine.mux.live(), 0);
}

#[tokio::test]
async fn connections_outlive_a_pause_but_not_a_reset() {
    let mut driver = Driver::new();
    let mut stream = connected(&mut driver).await;
    driver.rx.stop();
    driver.tx.stop();
    stream.write_all(b"while paused").unwrap();
    driver.offer_space(&WHOLE);
    assert_eq!(driver.serve(), Served::NotReady);
    driver.rx.start(1);
    driver.tx.start(1);
    assert_eq!(driver.serve(), Served::Idle);
    assert_eq!(driver.received(&WHOLE)[0].1, b"while paused");
    driver.reset();
    driver.serve();
    assert_eq!((driver.engine.mux.live(), stream.read(&mut [0; 1]).unwrap()), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn garbage_in_the_rings_neither_panics_nor_spins(
        garbage in proptest::collection::vec((0_u64..0x8000, any::<u64>()), 0..200),
        plausible in proptest::collection::vec((0_u16..RING, 0_u64..MEMORY + 100, 0_u32..9000, 0_u16..8), 0..40),
        available in (0_u16..RING + 2, 0_u16..RING + 2),
    ) {
        let mut driver = Driver::new();
        let memory = driver.memory.memory();
        for (at, value) in garbage {
            memory.write_obj(value, GuestAddress(at)).unwrap();
        }
        for (index, address, len, flags) in plausible {
            driver.tx.write_descriptor(&memory, index, (address, len), flags, index + 1);
            driver.rx.write_descriptor(&memory, index, (address, len), flags | 2, index + 1);
        }
        driver.rx.set_available(&memory, available.0);
        driver.tx.set_available(&memory, available.1);
        let serves = (0..20).take_while(|_| driver.serve() == Served::More).count();
        prop_assert!(serves < 20, "it spins");
    }
}
