//! The memory between the engine and a worker process, of any content at any time: nothing panics, nothing is taken that was not given.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/bdev/tests/fuzzed/mod.rs"]
mod fuzzed;

fuzz_target!(|data: &[u8]| fuzzed::worker_memory(data));
