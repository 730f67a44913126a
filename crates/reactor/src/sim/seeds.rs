//! Running many seeds, and repeating one.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::World;

/// A seed that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which.
    pub seed: u64,
    /// What its panic said.
    pub message: String,
}

/// Runs `body` under each seed until one fails.
pub fn first_failure(seeds: impl IntoIterator<Item = u64>, body: impl Fn(u64)) -> Option<Failure> {
    seeds.into_iter().find_map(|seed| {
        let panic = catch_unwind(AssertUnwindSafe(|| body(seed))).err()?;
        Some(Failure { seed, message: text(&*panic) })
    })
}

/// Runs `body` under `default_count` seeds, and panics with the first that fails.
///
/// `QPAIR_SIM_SEEDS` is another count, `QPAIR_SIM_FIRST` the first seed (0), `QPAIR_SIM_SEED` the only one.
pub fn run_seeds(name: &str, default_count: u64, body: impl Fn(u64)) {
    let begun = Instant::now();
    let (first, count) = match variable("QPAIR_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (variable("QPAIR_SIM_FIRST").unwrap_or(0), variable("QPAIR_SIM_SEEDS").unwrap_or(default_count)),
    };
    if let Some(Failure { seed, message }) = first_failure((0..count).map(|offset| first.wrapping_add(offset)), body) {
        let package = std::env::var("CARGO_PKG_NAME").unwrap_or_else(|_| "PACKAGE".to_owned());
        let test = std::thread::current().name().unwrap_or("TEST").to_owned();
        let command = format!("QPAIR_SIM_SEED={seed} cargo test -p {package} -- --exact {test}");
        panic!("simulation {name}, seed {seed}: {message}\nrepeat it by: {command}");
    }
    let seconds = begun.elapsed().as_secs_f64();
    eprintln!("simulation {name}: {count} seeds in {seconds:.2} s, {:.0} a second", count as f64 / seconds.max(1e-9));
}

/// [`run_seeds`] with a world of `reactors` for each seed, which must come to rest with all obligations closed after
/// `body`.
pub fn check(name: &str, default_count: u64, reactors: usize, body: impl Fn(&mut World)) {
    run_seeds(name, default_count, |seed| {
        let mut world = World::new(seed, reactors);
        body(&mut world);
        world.finish();
    });
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}, not a number")))
}

pub(super) fn text(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "(no text)".to_owned(),
    }
}
