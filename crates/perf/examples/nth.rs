//! A bdev module from nothing, outside of the workspace's own: it fails every n-th read of each reactor and passes on everything else.
//! docs/bdev.md walks through it. It stands on a null bdev here and is put under load.
//!
//! `cargo run --release -p qpair-perf --example nth -- [n]`

use std::error::Error;
use std::sync::Arc;

use qpair_bdev::null::Null;
use qpair_bdev::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_perf::{Spec, run};
use qpair_reactor::driver::Choice;
use qpair_reactor::{Config, Reactor, ReactorId, thread};

/// Shared by all reactors.
struct Nth {
    info: Info,
    base: Descriptor,
    n: u64,
}

impl Nth {
    fn new(registry: &Arc<Registry>, name: &str, base: &str, n: u64) -> Result<Self, BdevError> {
        if n == 0 {
            return Err(BdevError::invalid("n", n, "at least 1"));
        }
        // Claims the base: nobody else writes to it while this device lives.
        let base = registry.open_base(base, "nth")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        Ok(Self { info: Info::over(&below, name, "nth"), base, n })
    }
}

impl Device for Nth {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        Ok(Box::new(NthChannel { id, below, queue: layer.add_inner_queue(id), n: self.n, reads: 0, passed: Vec::with_capacity(256) }))
    }
}

/// One reactor's: no lock, no atomic.
struct NthChannel {
    id: ChannelId,
    below: ChannelId,
    queue: QueueId,
    n: u64,
    reads: u64,
    passed: Vec<IoId>,
}

impl Channel for NthChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for &id in batch {
            self.reads += u64::from(layer.io(id).op == Op::Read);
            if layer.io(id).op == Op::Read && self.reads.is_multiple_of(self.n) {
                layer.complete(id, Status::UNRECOVERED_READ_ERROR);
            } else {
                self.passed.push(id);
            }
        }
        layer.pass_down(reactor, self.below, self.queue, 0, 0, &self.passed);
        self.passed.clear();
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        layer.pass_up(self.id, 0, batch);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let n: u64 = std::env::args().nth(1).map_or(Ok(100), |text| text.parse())?;
    let thread = thread::spawn(ReactorId(0), Config::default(), Choice::Auto, false)?;
    let registry = Registry::new(vec![thread.handle().clone()]);
    registry.register(Arc::new(Null::new("null0", 4096, 1 << 20, None, 0)))?;
    registry.register(Arc::new(Nth::new(&registry, "nth0", "null0", n)?))?;
    let report = run(&registry, Spec { pattern: "randread".parse()?, depth: 128, max_ios: 1_000_000, ..Spec::new("nth0") })?;
    let reads = report.ios + report.errors;
    println!("{reads} reads, {} of them failed: one in {:.1}", report.errors, reads as f64 / report.errors.max(1) as f64);
    Ok(())
}
