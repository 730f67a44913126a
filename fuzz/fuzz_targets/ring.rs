//! A vhost-user-blk ring of any content, served by a session in the simulator: nothing panics, hangs or is kept.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/vhost/tests/fuzzed/mod.rs"]
#[allow(dead_code)]
mod fuzzed;

fuzz_target!(|data: &[u8]| fuzzed::ring(data));
