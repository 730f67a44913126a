//! What one core can do at best: copies of 4 KiB blocks at random, and a cache line's way to another core and back.
//!
//! `cargo run --release -p qpair-memory --example yardstick` prints one line of JSON. The copy loop moves blocks from
//! random places of 512 MiB (mapped as the malloc bdev maps: anonymous, transparent hugepages, every page
//! written) into 128 buffers in turn, fetching ahead; every way to copy is tried with every distance, and the best of
//! the medians is the yardstick. The ping-pong is one word that two pinned threads hand to each other: its round trip.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use qpair_memory::{Mapping, Pages, Region};

const BLOCK: usize = 4096;
const DISK: usize = 512 << 20;
const BUFFERS: usize = 128;
/// Blocks copied in one measurement.
const COUNT: usize = 100_000;
const ROUNDS: usize = 5;

type Copy = unsafe fn(*mut u8, *const u8);

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    pin(0);
    let disk = filled(DISK);
    let buffers = filled(BUFFERS * BLOCK);
    let order = places();
    let mut ways: Vec<(&str, Copy)> = vec![("memcpy", memcpy), ("rep_movsb", rep_movsb)];
    if is_x86_feature_detected!("avx2") {
        ways.extend([("avx2", avx2 as Copy), ("avx2_stream", avx2_stream as Copy)]);
    }
    if is_x86_feature_detected!("avx512f") {
        ways.extend([("avx512", avx512 as Copy), ("avx512_stream", avx512_stream as Copy)]);
    }
    let only = std::env::args().nth(1);
    let mut rows: Vec<(String, f64)> = Vec::new();
    for (name, copy) in ways.into_iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name)) {
        for (ahead, lines) in [(0, 0), (1, 16), (1, 64), (2, 16), (2, 32), (2, 64), (3, 64), (4, 64)] {
            let mut rates: Vec<f64> = (0..ROUNDS).map(|_| rate(&disk, &buffers, &order, copy, ahead, lines)).collect();
            rates.sort_by(f64::total_cmp);
            rows.push((format!("{name}/ahead={ahead}/lines={lines}"), rates[ROUNDS / 2]));
        }
    }
    rows.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all: Vec<String> = rows.iter().map(|(name, rate)| format!(r#""{name}":{rate:.0}"#)).collect();
    // `yardstick ping-pong` names no way to copy: then only the round trip is measured.
    let none = ("none".to_owned(), 0.0);
    let best = rows.first().unwrap_or(&none);
    let round_trip = ping_pong(cores).map_or("null".to_owned(), |ns| format!("{ns:.1}"));
    println!(
        r#"{{"copies_per_second":{:.0},"variant":"{}","ping_pong_ns":{round_trip},"variants":{{{}}}}}"#,
        best.1,
        best.0,
        all.join(",")
    );
}

fn filled(length: usize) -> Region {
    let mapping = Mapping::anonymous(length, Pages::Transparent).unwrap_or_else(|error| panic!("{length} bytes: {error}"));
    let region = Region::new(mapping);
    region.fill(0, length as u64, 0x5a).unwrap_or_else(|error| panic!("{error}"));
    region
}

/// Random block offsets, drawn beforehand so that the loop measures the copy alone.
fn places() -> Vec<u32> {
    let mut x = 0x9E37_79B9_7F4A_7C15u64;
    let mut draw = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (((x >> 32) * (DISK / BLOCK) as u64) >> 32) as u32
    };
    (0..COUNT).map(|_| draw()).collect()
}

fn rate(disk: &Region, buffers: &Region, order: &[u32], copy: Copy, ahead: usize, lines: usize) -> f64 {
    let from = disk.pointer(0, DISK as u64).unwrap_or_else(|error| panic!("{error}"));
    let into = buffers.pointer(0, (BUFFERS * BLOCK) as u64).unwrap_or_else(|error| panic!("{error}"));
    let start = Instant::now();
    for (position, place) in order.iter().enumerate() {
        if ahead > 0
            && let Some(next) = order.get(position + ahead)
        {
            for line in 0..lines {
                // SAFETY: places are below DISK / BLOCK and lines below BLOCK / 64, so this is in the region; a prefetch never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.add(*next as usize * BLOCK + line * 64).cast()) };
            }
        }
        // SAFETY: both blocks lie in their regions (see above; the buffer's index is below BUFFERS) and do not overlap.
        unsafe { copy(into.add(position % BUFFERS * BLOCK), from.add(*place as usize * BLOCK)) };
    }
    order.len() as f64 / start.elapsed().as_secs_f64()
}

unsafe fn memcpy(into: *mut u8, from: *const u8) {
    // The length is opaque: else the compiler puts in a loop of its own, which is not what `copy_from` gets.
    let length = std::hint::black_box(BLOCK);
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, into, length) }
}

unsafe fn rep_movsb(into: *mut u8, from: *const u8) {
    // SAFETY: the caller's promise; the direction flag is clear by the ABI.
    unsafe { asm!("rep movsb", inout("rcx") BLOCK => _, inout("rdi") into => _, inout("rsi") from => _, options(nostack, preserves_flags)) }
}

#[target_feature(enable = "avx2")]
unsafe fn avx2(into: *mut u8, from: *const u8) {
    for at in (0..BLOCK).step_by(128) {
        // SAFETY: the caller's promise.
        unsafe {
            let words: [__m256i; 4] = std::array::from_fn(|i| _mm256_loadu_si256(from.add(at + 32 * i).cast()));
            (0..4).for_each(|i| _mm256_storeu_si256(into.add(at + 32 * i).cast(), words[i]));
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn avx2_stream(into: *mut u8, from: *const u8) {
    for at in (0..BLOCK).step_by(128) {
        // SAFETY: the caller's promise; the buffers are aligned to 4096.
        unsafe {
            let words: [__m256i; 4] = std::array::from_fn(|i| _mm256_loadu_si256(from.add(at + 32 * i).cast()));
            (0..4).for_each(|i| _mm256_stream_si256(into.add(at + 32 * i).cast(), words[i]));
        }
    }
    _mm_sfence();
}

#[target_feature(enable = "avx512f")]
unsafe fn avx512(into: *mut u8, from: *const u8) {
    for at in (0..BLOCK).step_by(256) {
        // SAFETY: the caller's promise.
        unsafe {
            let words: [__m512i; 4] = std::array::from_fn(|i| _mm512_loadu_si512(from.add(at + 64 * i).cast()));
            (0..4).for_each(|i| _mm512_storeu_si512(into.add(at + 64 * i).cast(), words[i]));
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn avx512_stream(into: *mut u8, from: *const u8) {
    for at in (0..BLOCK).step_by(256) {
        // SAFETY: the caller's promise; the buffers are aligned to 4096.
        unsafe {
            let words: [__m512i; 4] = std::array::from_fn(|i| _mm512_loadu_si512(from.add(at + 64 * i).cast()));
            (0..4).for_each(|i| _mm512_stream_si512(into.add(at + 64 * i).cast(), words[i]));
        }
    }
    _mm_sfence();
}

/// Nanoseconds for a word to go from core 0 to core 1 and back, the median of several runs; None with one core. Bare
/// loops: a pause would be longer than the trip.
fn ping_pong(cores: usize) -> Option<f64> {
    const TRIPS: u64 = 500_000;
    #[repr(align(128))]
    struct Line(AtomicU64);
    static BALL: Line = Line(AtomicU64::new(0));
    if cores < 2 {
        return None;
    }
    let (ready, wait) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        pin(1);
        let _ = ready.send(());
        for trip in 0..TRIPS * ROUNDS as u64 {
            while BALL.0.load(Ordering::Acquire) != 2 * trip + 1 {}
            BALL.0.store(2 * trip + 2, Ordering::Release);
        }
    });
    // Asleep until then: the other thread begins on this core.
    let _ = wait.recv();
    let mut trips = 0..TRIPS * ROUNDS as u64;
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for trip in trips.by_ref().take(TRIPS as usize) {
                BALL.0.store(2 * trip + 1, Ordering::Release);
                while BALL.0.load(Ordering::Acquire) != 2 * trip + 2 {}
            }
            start.elapsed().as_nanos() as f64 / TRIPS as f64
        })
        .collect();
    other.join().ok()?;
    times.sort_by(f64::total_cmp);
    Some(times[ROUNDS / 2])
}

fn pin(core: usize) {
    // SAFETY: a zeroed cpu_set_t is an empty set; cores 0 and 1 are within its size. A refusal only costs steadiness.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}
