//! What the block-device layer costs beside the device: null alone, and null with something upon it, in turn in one process. Prints one line of
//! JSON: for each thing the nanoseconds an I/O in each pair of runs, without it and with it.
//!
//! `cargo run --release -p qpair-perf --example layers -- [pairs] [milliseconds] [depth] [core] [THING...]`

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc;

use qpair_bdev::histogram::{GRANULARITY, Shape};
use qpair_bdev::limit::Rates;
use qpair_bdev::measures;
use qpair_bdev::null::Null;
use qpair_bdev::passthru::Passthru;
use qpair_bdev::trace::{self, ALL_POINTS};
use qpair_bdev::{BdevError, Op, OpSet, Registry};
use qpair_perf::{Spec, run};
use qpair_reactor::driver::Choice;
use qpair_reactor::{Config, ReactorId, thread};

const BLOCKS: u64 = (512 << 20) / 4096;
/// More than any machine does, and little enough to be kept.
const IOS: u64 = 1_000_000_000;

/// Sets a bdev of that name up.
type Build = fn(&Arc<Registry>, &str) -> Result<(), BdevError>;

const THINGS: [(&str, Build); 5] =
    [("nothing", plain), ("passthru", passthru), ("limit", limit), ("group_and_all_limits", all_limits), ("histogram", histogram)];

fn plain(registry: &Arc<Registry>, name: &str) -> Result<(), BdevError> {
    registry.register(Arc::new(Null::new(name, 4096, BLOCKS, None, 0))).map(drop)
}

fn passthru(registry: &Arc<Registry>, name: &str) -> Result<(), BdevError> {
    let base = format!("{name}_base");
    plain(registry, &base)?;
    registry.register(Arc::new(Passthru::new(registry, name, &base, None)?)).map(drop)
}

fn limit(registry: &Arc<Registry>, name: &str) -> Result<(), BdevError> {
    plain(registry, name)?;
    wait(|reply| measures::set_limits(registry, name, [Some(IOS), None, None, None], reply))
}

fn all_limits(registry: &Arc<Registry>, name: &str) -> Result<(), BdevError> {
    plain(registry, name)?;
    let bytes = 1 << 40;
    wait(|reply| measures::set_limits(registry, name, [Some(IOS), Some(bytes), Some(bytes), Some(bytes)], reply))?;
    measures::create_group(registry, name, Rates { rw_ios: IOS, ..Rates::default() })?;
    wait(|reply| measures::join_group(registry, name, name, reply))
}

fn histogram(registry: &Arc<Registry>, name: &str) -> Result<(), BdevError> {
    plain(registry, name)?;
    let shape = Shape::new(GRANULARITY, 1000, 120_000_000_000, OpSet::of(&[Op::Read, Op::Write]))?;
    wait(|reply| measures::enable_histogram(registry, name, Some(shape), reply))
}

fn wait(ask: impl FnOnce(qpair_bdev::lifecycle::Reply<()>)) -> Result<(), BdevError> {
    let (send, receive) = mpsc::channel();
    ask(Box::new(move |outcome| drop(send.send(outcome))));
    receive.recv().unwrap_or_else(|_| Err(BdevError::Unsupported("the reactor ended".to_owned())))
}

/// Trace points, on a reactor of their own: the other's were never on.
const TRACES: [(&str, &[u8]); 2] = [("traces_off", &[ALL_POINTS, 0]), ("traces_on", &[ALL_POINTS])];

type Measured = Result<f64, Box<dyn Error>>;

/// Without and with, in turn.
fn pairs(count: u64, without: impl Fn() -> Measured, with: impl Fn() -> Measured) -> Result<String, Box<dyn Error>> {
    let mut found = Vec::new();
    for pair in 0..count {
        // Every other pair the other way round: neither gains by coming first.
        let (without, with) = if pair % 2 == 0 {
            let without = without()?;
            (without, with()?)
        } else {
            let with = with()?;
            (without()?, with)
        };
        found.push(format!("[{without:.2},{with:.2}]"));
    }
    Ok(found.join(","))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |text| text.parse());
    let (count, duration_ms, depth, core) = (number(5)?, number(200)?, number(128)? as u32, number(0)? as u32);
    let wanted: Vec<String> = arguments.collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    let thread = thread::spawn(ReactorId(core), Config::default(), Choice::Auto, true)?;
    let registry = Registry::new(vec![thread.handle().clone()]);
    plain(&registry, "alone")?;
    let measure = |registry: &Arc<Registry>, name: &str| -> Measured {
        let report = run(registry, Spec { depth, duration_ms, ..Spec::new(name) })?;
        Ok(1e9 / report.iops())
    };
    let mut lines = Vec::new();
    for (name, build) in THINGS.iter().filter(|(name, _)| is_wanted(name)) {
        build(&registry, name)?;
        let found = pairs(count, || measure(&registry, "alone"), || measure(&registry, name))?;
        lines.push(format!(r#""{name}":[{found}]"#));
    }
    let other = thread::spawn(ReactorId(core), Config::default(), Choice::Auto, true)?;
    let traced = Registry::new(vec![other.handle().clone()]);
    plain(&traced, "alone")?;
    for (name, steps) in TRACES.iter().filter(|(name, _)| is_wanted(name)) {
        for points in *steps {
            wait(|reply| trace::set(&traced, *points, reply))?;
        }
        let found = pairs(count, || measure(&registry, "alone"), || measure(&traced, "alone"))?;
        lines.push(format!(r#""{name}":[{found}]"#));
    }
    println!("{{{}}}", lines.join(","));
    Ok(())
}
