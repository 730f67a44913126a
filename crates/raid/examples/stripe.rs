//! What an array without redundancy costs: a bdev alone, and an array of two that are half as large, 4 KiB at random on one reactor, in turn in one process.
//! Prints one line of JSON: for each pattern the I/Os a second in each pair of runs, alone and with the array.
//!
//! Both have the same size, the same core, and the same slab; all their pages were written before.
//!
//! `cargo run --release -p qpair-raid --example stripe -- [pairs] [milliseconds] [depth] [core] [raid0|concat] [malloc|null] [PATTERN...]`

use std::error::Error;
use std::sync::{Arc, mpsc};

use qpair_bdev::{BdevError, Registry, malloc::Malloc, null::Null};
use qpair_perf::{Spec, run};
use qpair_raid::{Level, Raids, Spec as ArraySpec};
use qpair_reactor::driver::Choice;
use qpair_reactor::{Config, ReactorId, thread};

/// 512 MiB in blocks of 4 KiB, as the copy yardstick has them.
const BLOCKS: u64 = (512 << 20) / 4096;
const HALVES: [&str; 2] = ["half0", "half1"];

fn plain(registry: &Arc<Registry>, base: &str, name: &str, blocks: u64) -> Result<(), BdevError> {
    match base {
        "null" => registry.register(Arc::new(Null::new(name, 4096, blocks, None, 0))),
        _ => registry.register(Arc::new(Malloc::new(name, 4096, blocks, None, 0, 0)?)),
    }
    .map(drop)
}

fn array(registry: &Arc<Registry>, level: Level) -> Result<Arc<Raids>, Box<dyn Error>> {
    let (send, receive) = mpsc::channel();
    let bases = HALVES.map(str::to_owned).to_vec();
    let spec = ArraySpec { name: "array".to_owned(), level, strip_kb: 64, bases, uuid: None, superblock: false };
    let raids = Raids::new(registry);
    raids.create(spec, Box::new(move |outcome| drop(send.send(outcome))));
    receive.recv()??;
    Ok(raids)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| arguments.next().map_or(Ok(default), |text| text.parse());
    let (pairs, duration_ms, depth, core) = (number(9)?, number(200)?, number(128)? as u32, number(0)? as u32);
    let level = if arguments.next().as_deref() == Some("concat") { Level::CONCAT } else { Level::RAID0 };
    let base = arguments.next().unwrap_or_else(|| "malloc".to_owned());
    let mut patterns: Vec<String> = arguments.collect();
    if patterns.is_empty() {
        patterns = ["randread", "randwrite"].map(str::to_owned).to_vec();
    }
    let thread = thread::spawn(ReactorId(core), Config::default(), Choice::Auto, true)?;
    let registry = Registry::new(vec![thread.handle().clone()]);
    plain(&registry, &base, "alone", BLOCKS)?;
    HALVES.iter().try_for_each(|name| plain(&registry, &base, name, BLOCKS / 2))?;
    let _raids = array(&registry, level)?;
    for name in ["alone", "array"] {
        // Pages that were never written are all one page of zeros: that would measure the cache.
        run(&registry, Spec { pattern: "write".parse()?, max_ios: BLOCKS, io_bytes: 4096, ..Spec::new(name) })?;
    }
    let mut lines = Vec::new();
    for pattern in &patterns {
        let measure = |name: &str| -> Result<f64, Box<dyn Error>> {
            Ok(run(&registry, Spec { pattern: pattern.parse()?, depth, duration_ms, ..Spec::new(name) })?.iops())
        };
        let mut found = Vec::new();
        for pair in 0..pairs {
            // Every other pair the other way round: neither gains by coming first.
            let (alone, array) = if pair % 2 == 0 {
                let alone = measure("alone")?;
                (alone, measure("array")?)
            } else {
                let array = measure("array")?;
                (measure("alone")?, array)
            };
            found.push(format!("[{alone:.0},{array:.0}]"));
        }
        lines.push(format!(r#""{pattern}":[{}]"#, found.join(",")));
    }
    println!("{{{}}}", lines.join(","));
    Ok(())
}
