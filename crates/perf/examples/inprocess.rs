//! The in-process figure: a bdev of this process, driven by the load generator on one reactor. Prints one line of JSON.
//!
//! `cargo run --release -p qpair-perf --example inprocess -- [null|malloc] [depth] [milliseconds] [pattern] [core]`

use std::error::Error;
use std::sync::Arc;

use qpair_bdev::{Device, Registry, malloc::Malloc, null::Null};
use qpair_perf::{Spec, run};
use qpair_reactor::driver::Choice;
use qpair_reactor::{Config, ReactorId, thread};

/// 512 MiB in blocks of 4 KiB, as the copy yardstick has them.
const BLOCKS: u64 = (512 << 20) / 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let module = arguments.next().unwrap_or_else(|| "null".to_owned());
    let depth: u32 = arguments.next().map_or(Ok(128), |text| text.parse())?;
    let duration_ms: u64 = arguments.next().map_or(Ok(1000), |text| text.parse())?;
    let pattern = arguments.next().unwrap_or_else(|| "randread".to_owned());
    let core: u32 = arguments.next().map_or(Ok(0), |text| text.parse())?;

    let device: Arc<dyn Device> = match module.as_str() {
        "null" => Arc::new(Null::new("bench", 4096, BLOCKS, None, 0)),
        "malloc" => Arc::new(Malloc::new("bench", 4096, BLOCKS, None, 0, 0)?),
        other => return Err(format!("module {other}: null or malloc").into()),
    };
    let thread = thread::spawn(ReactorId(core), Config::default(), Choice::Auto, true)?;
    let registry = Registry::new(vec![thread.handle().clone()]);
    registry.register(device)?;
    if module == "malloc" {
        // Pages that were never written are all one page of zeros: that would measure the cache.
        run(&registry, Spec { pattern: "write".parse()?, max_ios: BLOCKS, io_bytes: 4096, ..Spec::new("bench") })?;
    }
    let report = run(&registry, Spec { pattern: pattern.parse()?, depth, duration_ms, ..Spec::new("bench") })?;
    println!(
        r#"{{"module":"{module}","pattern":"{pattern}","depth":{depth},"iops":{:.0},"mean_ns":{:.1},"p50_ns":{},"p99_ns":{},"p99.9_ns":{},"max_ns":{},"errors":{}}}"#,
        report.iops(),
        report.mean_ns,
        report.percentile_ns(50.0),
        report.percentile_ns(99.0),
        report.percentile_ns(99.9),
        report.max_ns,
        report.errors
    );
    Ok(())
}
