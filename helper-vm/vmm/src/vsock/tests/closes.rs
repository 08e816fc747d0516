//! How connections open, give credit back and end when both sides keep to the protocol, one case each.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::table::{FIRST_HOST_PORT, Table, ops, packet};
use crate::vsock::credit::BUFFER;
use crate::vsock::packet::{Directions, Header, Op};

const CHUNK: u32 = 64 * 1024;

fn shutdown(directions: Directions) -> Header {
    Header { flags: directions.flags(), ..packet(Op::Shutdown) }
}

#[tokio::test]
async fn a_guest_that_closes_gets_its_reset_at_once_and_its_last_words_are_read() {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    table.send(&Header { len: 10, ..packet(Op::Data) });
    table.send(&shutdown(Directions::BOTH));
    assert_eq!(ops(&table.drain()), [Op::Reset]);
    assert_eq!(stream.read(&mut [0; 99]).unwrap(), 10);
    assert_eq!(stream.read(&mut [0; 99]).unwrap(), 0);
    assert_eq!(table.mux.live(), 0);
}

#[tokio::test]
async fn the_ports_of_a_closed_connection_are_free_while_its_user_still_reads() {
    let mut table = Table::new();
    let mut first = table.connected().await;
    for _ in 0..BUFFER / CHUNK {
        table.send(&Header { len: CHUNK, ..packet(Op::Data) });
    }
    table.send(&shutdown(Directions::BOTH));
    table.drain();
    assert_eq!(table.mux.live(), 1, "bytes wait for the user");
    let mut second = table.connected().await;
    let mut left = BUFFER as usize;
    while left > 0 {
        left -= first.read(&mut vec![0; left]).unwrap();
        table.poll();
    }
    assert_eq!((first.read(&mut [0; 1]).unwrap(), table.mux.live()), (0, 1));
    table.send(&Header { len: 3, ..packet(Op::Data) });
    assert_eq!(second.read(&mut [0; 9]).unwrap(), 3);
}

#[tokio::test]
async fn a_guest_that_is_done_sending_still_receives() {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    table.send(&shutdown(Directions::SEND));
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    stream.write_all(b"answer").unwrap();
    table.poll();
    let answers = table.drain();
    assert_eq!((ops(&answers), answers[0].len), (vec![Op::Data], 6));
}

#[tokio::test]
async fn a_guest_that_is_done_receiving_fails_the_users_writes_and_still_sends() {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    table.send(&shutdown(Directions::RECEIVE));
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    table.send(&Header { len: 4, ..packet(Op::Data) });
    assert_eq!(stream.read(&mut [0; 9]).unwrap(), 4);
}

#[tokio::test]
async fn directions_that_the_guest_ends_one_by_one_end_the_connection() {
    let mut table = Table::new();
    let _stream = table.connected().await;
    table.send(&shutdown(Directions::SEND));
    table.drain();
    assert_eq!(table.mux.live(), 1);
    table.send(&shutdown(Directions::RECEIVE));
    assert!(ops(&table.drain()).contains(&Op::Reset));
    assert_eq!(table.mux.live(), 0);
}

#[tokio::test]
async fn the_users_half_close_and_close_are_told_in_this_order_after_its_bytes() {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    stream.write_all(b"bytes").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    table.poll();
    let told = table.drain();
    assert_eq!((ops(&told), told[1].flags), (vec![Op::Data, Op::Shutdown], Directions::SEND.flags()));
    drop(stream);
    table.poll();
    let told = table.drain();
    assert_eq!((ops(&told), told[0].flags), (vec![Op::Shutdown], Directions::BOTH.flags()));
    table.send(&packet(Op::Reset));
    assert_eq!(table.mux.live(), 0);
}

#[tokio::test]
async fn credit_comes_back_while_the_user_keeps_up() {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    let mut updates = 0;
    for _ in 0..8 * BUFFER / CHUNK {
        table.send(&Header { len: CHUNK, ..packet(Op::Data) });
        stream.read_exact(&mut [0; CHUNK as usize]).unwrap();
        updates += ops(&table.drain()).len();
    }
    assert!(updates >= 8, "{updates}");
}

#[tokio::test]
async fn credit_comes_back_when_a_late_user_reads() {
    let mut table = Table::new();
    let mut stream = table.connected().await;
    for _ in 0..BUFFER / CHUNK {
        table.send(&Header { len: CHUNK, ..packet(Op::Data) });
    }
    let mut left = BUFFER as usize;
    while left > 0 {
        left -= stream.read(&mut vec![0; left]).unwrap();
        table.poll();
    }
    let told = table.drain();
    assert_eq!((ops(&told), told[0].fwd_cnt), (vec![Op::CreditUpdate], BUFFER));
}

#[test]
fn a_user_of_the_per_vm_socket_reads_the_greeting_before_the_guests_bytes() {
    let mut table = Table::new();
    let (mut user, mut answer) = table.connect(true);
    assert_eq!(ops(&table.drain()), [Op::Request]);
    let from = |op| Header { src_port: 1, dst_port: FIRST_HOST_PORT, ..packet(op) };
    table.send(&from(Op::Response));
    table.send(&Header { len: 1, ..from(Op::Data) });
    assert_eq!(answer.try_recv().unwrap().unwrap(), FIRST_HOST_PORT);
    let mut read = [0; 64];
    let n = user.read(&mut read).unwrap();
    assert_eq!(&read[..n], format!("OK {FIRST_HOST_PORT}\n\x5a").as_bytes());
}
