//! A guest that breaks the protocol, at the table's edge: each offence has its answer, and any mixture of
//! packets leaves the table bounded.

use std::io::{Read, Write};
use std::sync::Arc;

use proptest::prelude::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::peer::LISTENED;
use super::table::{FIRST_HOST_PORT, Table, ops, packet};
use crate::vsock::credit::BUFFER;
use crate::vsock::error::ConnectError;
use crate::vsock::listen::Listeners;
use crate::vsock::mux::{MAX_CONNECTIONS, MAX_RESETS};
use crate::vsock::packet::{Directions, Header, Op, TYPE_STREAM};

/// The offence is answered by RST, and the user reads the end of file.
async fn ends_the_connection(offence: &Header) {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    table.send(offence);
    assert_eq!(ops(&table.drain()), [Op::Reset], "{offence:?}");
    assert_eq!(table.mux.live(), 0);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
}

#[tokio::test]
async fn offences_end_their_connection() {
    ends_the_connection(&packet(Op::Request)).await;
    ends_the_connection(&packet(Op::Response)).await;
    ends_the_connection(&Header { op: 0, ..packet(Op::Data) }).await;
    ends_the_connection(&Header { op: 9, ..packet(Op::Data) }).await;
    ends_the_connection(&Header { len: BUFFER + 1, ..packet(Op::Data) }).await;
}

#[tokio::test]
async fn data_past_the_credit_ends_the_connection_but_what_came_before_is_read() {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    let mut sent = 0;
    loop {
        table.send(&Header { len: BUFFER / 4, ..packet(Op::Data) });
        if ops(&table.drain()).contains(&Op::Reset) {
            break;
        }
        sent += BUFFER / 4;
        assert!(sent < 16 * BUFFER, "no end of credit");
    }
    let mut read = Vec::new();
    while read.len() < sent as usize {
        let mut buffer = [0; 65_536];
        let n = stream.read(&mut buffer).unwrap();
        read.extend_from_slice(&buffer[..n]);
        table.poll();
    }
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    table.poll();
    assert_eq!(table.mux.live(), 0);
}

#[tokio::test]
async fn data_after_the_guests_end_ends_the_connection() {
    let mut table = Table::new();
    let _stream = table.connected().await;
    table.send(&Header { flags: Directions::SEND.flags(), ..packet(Op::Shutdown) });
    assert!(table.drain().is_empty());
    table.send(&Header { len: 1, ..packet(Op::Data) });
    assert_eq!(ops(&table.drain()), [Op::Reset]);
}

#[tokio::test]
async fn a_packet_whose_length_lies_ends_its_connection() {
    let mut table = Table::new();
    let _stream = table.connected().await;
    table.mux.receive_broken(&Header { len: 99, ..packet(Op::Data) });
    assert_eq!(ops(&table.drain()), [Op::Reset]);
    assert_eq!(table.mux.live(), 0);
}

#[test]
fn packets_that_belong_nowhere_are_answered_by_a_reset_but_a_reset_is_not() {
    let mut table = Table::new();
    let unlistened = Header { dst_port: 1, ..packet(Op::Request) };
    for stray in
        [packet(Op::Data), packet(Op::Shutdown), packet(Op::CreditRequest), packet(Op::Response), unlistened]
    {
        table.send(&stray);
        let answers = table.drain();
        assert_eq!(ops(&answers), [Op::Reset]);
        assert_eq!((answers[0].src_port, answers[0].dst_port), (stray.dst_port, stray.src_port));
    }
    table.send(&packet(Op::Reset));
    table.mux.receive_broken(&packet(Op::Reset));
    assert!(table.drain().is_empty());
}

#[test]
fn a_type_that_is_not_offered_is_refused_in_its_own_terms() {
    let mut table = Table::new();
    table.send(&Header { kind: 2, ..packet(Op::Request) });
    let answers = table.drain();
    assert_eq!((ops(&answers), answers[0].kind), (vec![Op::Reset], 2));
}

#[test]
fn packets_with_foreign_addresses_are_dropped() {
    let mut table = Table::new();
    for (src_cid, dst_cid) in
        [(4, 2), (3, 3), (2, 3), (3, 0), (u64::MAX, 2), (3 | 1 << 32, 2), (3, 2 | 1 << 32)]
    {
        table.send(&Header { src_cid, dst_cid, ..packet(Op::Request) });
        table.send(&Header { src_cid, dst_cid, ..packet(Op::Data) });
    }
    assert!(table.drain().is_empty() && table.mux.live() == 0);
}

#[test]
fn an_answer_that_nobody_waits_for_or_that_comes_too_early_is_an_offence() {
    let mut table = Table::new();
    let (_user, mut answer) = table.connect(false);
    let early = Header { src_port: 1, dst_port: FIRST_HOST_PORT, ..packet(Op::Response) };
    table.send(&early);
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::Refused(1))));
    assert_eq!(ops(&table.drain()), [Op::Reset]);
}

#[test]
fn a_connect_is_taken_back_without_a_trace_or_with_a_reset_once_the_guest_knows() {
    let mut table = Table::new();
    drop(table.connect(false));
    table.poll();
    assert_eq!((table.mux.live(), table.drain().len()), (0, 0));
    let pending = table.connect(false);
    assert_eq!(ops(&table.drain()), [Op::Request]);
    drop(pending);
    table.poll();
    assert_eq!(ops(&table.drain()), [Op::Reset]);
    assert_eq!(table.mux.live(), 0);
}

#[test]
fn a_driver_reset_keeps_only_connects_that_the_guest_has_not_heard_of() {
    let mut table = Table::new();
    let (_told_user, mut told) = table.connect(false);
    assert_eq!(ops(&table.drain()), [Op::Request]);
    let (_untold_user, mut untold) = table.connect(false);
    table.mux.reset();
    assert!(matches!(told.try_recv().unwrap(), Err(ConnectError::Gone(1))));
    assert!(untold.try_recv().is_err());
    assert_eq!(ops(&table.drain()), [Op::Request]);
}

#[test]
fn a_driver_reset_takes_back_the_resets_that_the_old_driver_was_owed() {
    let mut table = Table::new();
    table.send(&packet(Op::Data));
    table.mux.reset();
    assert!(table.drain().is_empty());
}

#[test]
fn resets_stop_the_intake_and_their_delivery_resumes_it() {
    let mut table = Table::new();
    let mut taken = 0;
    while table.mux.takes_packets() {
        table.send(&Header { src_port: taken, ..packet(Op::Data) });
        taken += 1;
    }
    assert_eq!(taken as usize, MAX_RESETS);
    table.next().unwrap();
    assert!(table.mux.takes_packets());
}

#[tokio::test]
async fn a_guest_that_asks_for_credit_without_end_is_owed_one_answer() {
    let mut table = Table::new();
    let _stream = table.connected().await;
    for _ in 0..10_000 {
        table.send(&packet(Op::CreditRequest));
    }
    assert_eq!(ops(&table.drain()), [Op::CreditUpdate]);
}

#[tokio::test]
async fn a_guest_without_credit_is_asked_once_and_others_go_on() {
    let mut table = Table::new();
    let mut stuck = table.connected().await;
    table.send(&Header { buf_alloc: 0, ..packet(Op::CreditUpdate) });
    stuck.write_all(b"never").unwrap();
    let other = Header { src_port: 6, ..packet(Op::Request) };
    table.send(&other);
    let mut stream = table.listener.accept().await.unwrap().into_std().unwrap();
    stream.write_all(b"goes on").unwrap();
    table.poll();
    let mut answers = table.drain();
    answers.sort_by_key(|h| (h.dst_port, h.op));
    assert_eq!(ops(&answers), [Op::CreditRequest, Op::Response, Op::Data]);
    table.send(&Header { buf_alloc: 0, ..packet(Op::CreditUpdate) });
    assert!(table.drain().is_empty());
}

#[tokio::test]
async fn the_table_is_bounded_for_guest_and_host() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let mut table = Table::new();
    let mut users = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        table.send(&Header { src_port: port, ..packet(Op::Request) });
        users.push(table.listener.accept().await.unwrap());
    }
    table.drain();
    table.send(&Header { src_port: u32::MAX, ..packet(Op::Request) });
    assert_eq!(ops(&table.drain()), [Op::Reset]);
    let (_user, mut answer) = table.connect(false);
    assert!(matches!(answer.try_recv().unwrap(), Err(ConnectError::Full(MAX_CONNECTIONS))));
    users.pop();
    table.poll();
    let closes = table.drain();
    assert_eq!(ops(&closes), [Op::Shutdown]);
    table.send(&Header { src_port: closes[0].dst_port, ..packet(Op::Reset) });
    let (_user, mut answer) = table.connect(false);
    assert!(answer.try_recv().is_err(), "there is room again");
}

#[test]
fn connections_that_nobody_accepts_are_bounded_and_the_rest_refused() {
    let mut table = Table::new();
    for port in 0..200 {
        table.send(&Header { src_port: port, ..packet(Op::Request) });
    }
    let answers = table.drain();
    let refused = answers.iter().filter(|h| h.op() == Some(Op::Reset)).count();
    assert_eq!((refused, answers.len()), (200 - 64, 200));
}

fn header() -> impl Strategy<Value = Header> {
    (
        (prop_oneof![9 => Just(3_u64), 1 => any::<u64>()], prop_oneof![9 => Just(2_u64), 1 => any::<u64>()]),
        (0_u32..6, prop_oneof![4 => Just(LISTENED), 4 => (1 << 30)..(1_u32 << 30) + 6, 1 => any::<u32>()]),
        (
            prop_oneof![4 => 0_u32..100, 2 => 0_u32..70_000, 1 => Just(BUFFER), 1 => Just(BUFFER + 1)],
            0_u16..9,
        ),
        (prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()], 0_u32..5, any::<u32>(), any::<u32>()),
    )
        .prop_map(
            |((src_cid, dst_cid), (src_port, dst_port), (len, op), (kind, flags, buf_alloc, fwd_cnt))| {
                Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
            },
        )
}

#[derive(Clone, Debug)]
enum Step {
    Send(Header),
    SendBroken(Header),
    Take(usize),
    Connect,
    UserActs { user: usize, write: usize, close: bool },
    Poll,
    DriverReset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => header().prop_map(Step::Send),
        2 => header().prop_map(Step::SendBroken),
        6 => (0_usize..20).prop_map(Step::Take),
        3 => Just(Step::Connect),
        4 => (0_usize..8, 0_usize..5000, any::<bool>())
            .prop_map(|(user, write, close)| Step::UserActs { user, write, close }),
        4 => Just(Step::Poll),
        1 => Just(Step::DriverReset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_packets_in_any_order_leave_the_table_whole(steps in proptest::collection::vec(step(), 1..200)) {
        let mut table = Table::new();
        let mut users = Vec::new();
        for step in steps {
            match step {
                Step::Send(header) if table.mux.takes_packets() => table.send(&header),
                Step::SendBroken(header) if table.mux.takes_packets() => table.mux.receive_broken(&header),
                Step::Send(_) | Step::SendBroken(_) => {}
                Step::Take(count) => {
                    (0..count).for_each(|_| {
                        table.next();
                    });
                }
                Step::Connect => users.push(table.connect(false).0),
                Step::UserActs { user, write, close } if user < users.len() => {
                    let _ = users[user].write(&vec![1; write]);
                    if close {
                        users.swap_remove(user);
                    }
                }
                Step::UserActs { .. } => {}
                Step::Poll => table.poll(),
                Step::DriverReset => table.mux.reset(),
            }
            prop_assert!(table.mux.live() <= 6 * 20);
        }
        table.mux.reset();
        users.clear();
        table.listener = Arc::new(Listeners::default()).listen(LISTENED).unwrap();
        table.poll();
        prop_assert_eq!(table.mux.live(), 0);
    }
}
