//! An inflight region of any content, and the ring whose requests it claims: nothing panics, hangs or is kept.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/vhost/tests/fuzzed/mod.rs"]
#[allow(dead_code)]
mod fuzzed;

fuzz_target!(|data: &[u8]| fuzzed::inflight(data));
