//! How fast the machine's cores run just now, for the benchmark to know which of its rounds were disturbed.
//!
//! `cargo run --release -p qpair-memory --example pace -- CORE CORE...` prints one line of JSON: for each core, all at the same time, billions of steps a
//! second of a loop that fills a core's execution units and touches no memory. A neighbour on the same physical core takes of exactly these.

use std::hint::black_box;
use std::time::Instant;

/// Steps of one measurement: some 10 ms.
const STEPS: u64 = 4_000_000;
const CHAINS: usize = 8;

fn main() {
    let cores: Vec<u32> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let threads: Vec<_> = cores.into_iter().map(|core| std::thread::spawn(move || pace(core))).collect();
    let paces: Vec<String> = threads.into_iter().map(|thread| format!("{:.4}", thread.join().unwrap_or(0.0))).collect();
    println!(r#"{{"pace":[{}]}}"#, paces.join(","));
}

fn pace(core: u32) -> f64 {
    if pin(core) {
        return 0.0;
    }
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

fn pin(core: u32) -> bool {
    // SAFETY: a zeroed cpu_set_t is an empty set; `core` is within its size, which is looked at first.
    (core as usize) >= 8 * size_of::<libc::cpu_set_t>()
        || unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(core as usize, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) != 0
        }
}
