//! What is fuzzed: the check of an answer, and what an answer that passed must be. An input is the question (16
//! bytes: opcode, 0, size) and then the answer as it comes off the stream.

use vmctr_fileshare::export::host::{Config, Question, Remember, check};
use vmctr_fileshare::export::wire::abi::{ENTRY_OUT, Entry, OUT_HEADER, OWN_NODES, PURE, op};
use vmctr_fileshare::export::wire::codec::{Take, check_name};

/// The request's number in all inputs.
const UNIQUE: u64 = 2;

/// A question, its answer, and the answer as it is after the check; `None` if it is refused.
fn checked(input: &[u8]) -> Option<(Question, &[u8], Vec<u8>)> {
    let mut take = Take::new(input);
    let (opcode, _, size) = (take.u32().ok()?, take.u32().ok()?, take.u64().ok()?);
    let question = Question { opcode, unique: UNIQUE, nodeid: 1, size };
    let mut answer = take.rest().to_vec();
    let remember = Remember::new(&Config::new("/mnt".into()));
    check(&question, &mut answer, remember).ok()?;
    Some((question, take.rest(), answer))
}

/// Whether an answer passes.
#[allow(dead_code)] // The fuzzer does not ask.
pub fn passes(input: &[u8]) -> bool {
    checked(input).is_some()
}

/// Panics if an answer passes that must not.
pub fn run(input: &[u8]) {
    let Some((Question { opcode, size, .. }, before, answer)) = checked(input) else { return };
    assert_eq!(answer.len(), before.len());
    assert_eq!(answer[..OUT_HEADER], before[..OUT_HEADER]);
    let body = &before[OUT_HEADER..];
    let failed = answer[4..8] != [0; 4];
    assert!(!failed || body.is_empty(), "an error with a body passed");
    match opcode {
        _ if failed => {}
        op::READ | op::READDIR | op::READDIRPLUS => assert!(body.len() as u64 <= size),
        op::MKDIR => assert_eq!(entry(&body[..ENTRY_OUT]).attr.mode & 0o170_000, 0o040_000),
        op::LOOKUP => {
            let (found, place) = body.split_at(ENTRY_OUT);
            let found = entry(found);
            assert!(found.nodeid != 1 && found.nodeid < OWN_NODES && found.attr.size <= i64::MAX as u64);
            assert!(place.is_empty() || place.len() > PURE && found.attr.mode & 0o170_000 == 0o040_000);
        }
        op::FIND => {
            assert_eq!(body.len() as u64, size * ENTRY_OUT as u64);
            let found = body.chunks(ENTRY_OUT).map(entry);
            found.for_each(|found| assert!(found.nodeid > 1 && found.nodeid < OWN_NODES));
        }
        _ => {}
    }
    if opcode == op::READDIRPLUS && !failed {
        listing(body);
    }
}

fn entry(body: &[u8]) -> Entry {
    assert_eq!(body.len(), ENTRY_OUT);
    Entry::take(&mut Take::new(body)).expect("an entry that cannot be read passed")
}

fn listing(body: &[u8]) {
    let mut take = Take::new(body);
    while !take.rest().is_empty() {
        let mut part = || {
            take.bytes(ENTRY_OUT + 16).ok()?;
            let (length, _) = (take.u32().ok()? as usize, take.u32().ok()?);
            let name = take.bytes(length).ok()?;
            take.bytes((24 + length).next_multiple_of(8) - 24 - length).ok()?;
            Some(name)
        };
        let name = part().expect("a listing that ends in an entry passed");
        assert!(matches!(name, b"." | b"..") || check_name(name).is_ok(), "{name:?} passed");
    }
}
