//! Bytes from a guest as the answer to a request.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../reply.rs"]
mod reply;

fuzz_target!(|input: &[u8]| reply::run(input));
