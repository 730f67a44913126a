//! What a turn costs, and a message there and back: `cargo run --release -p qpair-reactor --example turn`.
//!
//! Each figure is the best of several rounds: what else the machine does only ever adds to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qpair_reactor::driver::{self, Choice};
use qpair_reactor::{Clock, Config, Handle, Poller, Reactor, ReactorId, thread};

const TIME: Duration = Duration::from_secs(2);
const TURNS: u64 = 100_000;
const TRIPS: u64 = 1_000;

struct Nothing;

impl Poller for Nothing {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

fn turn_ns(choice: Choice) -> std::io::Result<(&'static str, f64)> {
    let driver = driver::open(choice)?;
    let name = driver.name();
    let mut reactor = Reactor::new(ReactorId(0), Config { spin_ns: 0, busy_poll: true }, Clock::Monotonic, driver);
    reactor.add_poller("nothing", Box::new(Nothing));
    let round = || {
        let begun = Instant::now();
        for _ in 0..TURNS {
            std::hint::black_box(reactor.turn());
        }
        begun.elapsed().as_nanos() as f64 / TURNS as f64
    };
    Ok((name, best(round)))
}

fn best(mut round: impl FnMut() -> f64) -> f64 {
    let begun = Instant::now();
    let mut best = round();
    while begun.elapsed() < TIME {
        best = best.min(round());
    }
    best
}

/// One message to the other reactor and one back, until none is left.
fn bounce(here: Handle, there: Handle, left: Arc<AtomicU64>) {
    if left.fetch_sub(1, Ordering::Relaxed) > 1 {
        let (next_here, next_there) = (there.clone(), here);
        there.call(move |_| bounce(next_here, next_there, left));
    }
}

fn trip_ns(config: Config) -> std::io::Result<f64> {
    let one = thread::spawn(ReactorId(0), config, Choice::Auto, false)?;
    let two = thread::spawn(ReactorId(1), config, Choice::Auto, false)?;
    let round = || {
        let left = Arc::new(AtomicU64::new(2 * TRIPS));
        let begun = Instant::now();
        bounce(one.handle().clone(), two.handle().clone(), left.clone());
        // This thread leaves the cores to the reactors.
        while left.load(Ordering::Relaxed) > 0 {
            std::thread::sleep(Duration::from_micros(100));
        }
        begun.elapsed().as_nanos() as f64 / TRIPS as f64
    };
    Ok(best(round))
}

fn main() -> std::io::Result<()> {
    for choice in [Choice::IoUring, Choice::Epoll] {
        match turn_ns(choice) {
            Ok((name, ns)) => println!("empty turn, one active poller, {name}: {ns:.1} ns"),
            Err(error) => println!("{choice:?}: skipped: {error}"),
        }
    }
    let polling = trip_ns(Config { spin_ns: 0, busy_poll: true })?;
    println!("message there and back, both polling: {polling:.0} ns");
    let asleep = trip_ns(Config { spin_ns: 0, busy_poll: false })?;
    println!("message there and back, both asleep between: {asleep:.0} ns");
    Ok(())
}
