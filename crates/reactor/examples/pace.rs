//! How fast the machine's cores run just now, for the benchmark to know which of its rounds were disturbed.
//!
//! `cargo run --release -p qpair-reactor --example pace -- CORE CORE...` prints one line of JSON: for each core, all at the same time, billions of steps a
//! second of a loop that fills a core's execution units and touches no memory. A neighbour on the same physical core takes of exactly these.

use std::hint::black_box;
use std::time::Instant;

use qpair_reactor::thread::pin_to;

/// Steps of one measurement: some 10 ms.
const STEPS: u64 = 4_000_000;
const CHAINS: usize = 8;

fn main() {
    let cores: Vec<u32> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let threads: Vec<_> = cores.into_iter().map(|core| std::thread::spawn(move || pace(core))).collect();
    let paces: Vec<String> = threads.into_iter().map(|thread| format!("{:.4}", thread.join().expect("a core that is there"))).collect();
    println!(r#"{{"pace":[{}]}}"#, paces.join(","));
}

fn pace(core: u32) -> f64 {
    pin_to(core).unwrap_or_else(|error| panic!("core {core}: {error}"));
    let start = Instant::now();
    let mut words = [1u64; CHAINS];
    for step in 0..STEPS {
        for (chain, word) in words.iter_mut().enumerate() {
            *word = (*word ^ step).rotate_left(chain as u32).wrapping_add(*word >> 3);
        }
        words = black_box(words);
    }
    STEPS as f64 / start.elapsed().as_nanos() as f64
}
