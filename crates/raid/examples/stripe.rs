//! What a raid0 costs: malloc alone, and a raid0 of two, 4 KiB at random on one reactor, in turn. Prints one line of JSON with the median of the ratios.
//!
//! `cargo run --release -p qpair-raid --example stripe -- [depth] [milliseconds] [pattern] [core] [rounds]`

use std::error::Error;
use std::sync::{Arc, mpsc};

use qpair_bdev::{Registry, malloc::Malloc};
use qpair_perf::{Spec, run};
use qpair_raid::{Level, Raids, Spec as ArraySpec};
use qpair_reactor::driver::Choice;
use qpair_reactor::{Config, ReactorId, thread};

/// 512 MiB in blocks of 4 KiB, as the copy yardstick has them.
const BLOCKS: u64 = (512 << 20) / 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let depth: u32 = arguments.next().map_or(Ok(128), |text| text.parse())?;
    let duration_ms: u64 = arguments.next().map_or(Ok(500), |text| text.parse())?;
    let pattern = arguments.next().unwrap_or_else(|| "randread".to_owned());
    let core: u32 = arguments.next().map_or(Ok(0), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let thread = thread::spawn(ReactorId(core), Config::default(), Choice::Auto, true)?;
    let registry = Registry::new(vec![thread.handle().clone()]);
    registry.register(Arc::new(Malloc::new("alone", 4096, BLOCKS, None, 0, 0)?))?;
    let halves = ["half0", "half1"];
    for name in halves {
        registry.register(Arc::new(Malloc::new(name, 4096, BLOCKS / 2, None, 0, 0)?))?;
    }
    let (send, receive) = mpsc::channel();
    let bases = halves.map(str::to_owned).to_vec();
    let spec = ArraySpec { name: "stripe".to_owned(), level: Level::RAID0, strip_kb: 64, bases, uuid: None, superblock: false };
    let raids = Raids::new(&registry);
    raids.create(spec, Box::new(move |outcome| drop(send.send(outcome))));
    receive.recv()??;
    for name in ["alone", "stripe"] {
        // Pages that were never written are all one page of zeros: that would measure the cache.
        run(&registry, Spec { pattern: "write".parse()?, max_ios: BLOCKS, io_bytes: 4096, ..Spec::new(name) })?;
    }
    let measure = |name: &str| -> Result<f64, Box<dyn Error>> {
        Ok(run(&registry, Spec { pattern: pattern.parse()?, depth, duration_ms, ..Spec::new(name) })?.iops())
    };
    let mut pairs = Vec::new();
    for _ in 0..rounds {
        pairs.push((measure("alone")?, measure("stripe")?));
    }
    pairs.sort_by(|(alone, stripe), (other, striped)| (stripe / alone).total_cmp(&(striped / other)));
    let (alone, stripe) = pairs[rounds / 2];
    let ratio = stripe / alone;
    println!(r#"{{"pattern":"{pattern}","depth":{depth},"malloc_iops":{alone:.0},"raid0_iops":{stripe:.0},"ratio":{ratio:.3}}}"#);
    Ok(())
}
