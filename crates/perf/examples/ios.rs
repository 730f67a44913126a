//! The block-device layer's share of I/Os to null, alone on a thread and without a driver, to count instructions: the difference of two runs.
//!
//! `valgrind --tool=callgrind target/release/examples/ios [null|passthru] [depth] [rounds] [off|cycled|on]`: trace points never on; on and off again before; on.

use std::error::Error;
use std::sync::Arc;

use qpair_bdev::null::Null;
use qpair_bdev::passthru::Passthru;
use qpair_bdev::trace::{self, ALL_POINTS};
use qpair_bdev::{IoId, Layer, Op, Registry};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::World;
use qpair_reactor::{Poller, Reactor};

struct Nobody;

impl Poller for Nobody {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kind = arguments.next().unwrap_or_else(|| "null".to_owned());
    let depth: usize = arguments.next().map_or(Ok(128), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(1000), |text| text.parse())?;
    let mode = arguments.next().unwrap_or_else(|| "off".to_owned());
    let mut world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    registry.register(Arc::new(Null::new("null", 4096, 1 << 20, None, 0)))?;
    if kind == "passthru" {
        registry.register(Arc::new(Passthru::new(&registry, "passthru", "null", None)?))?;
    }
    let points: &[u8] = match &*mode {
        "off" => &[],
        "cycled" => &[ALL_POINTS, 0],
        "on" => &[ALL_POINTS],
        other => return Err(format!("mode {other}: off, cycled or on").into()),
    };
    for points in points {
        trace::set(&registry, *points, Box::new(|_| {}));
        world.settle();
    }
    let open = registry.open(&kind, true, |_| {})?;
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let poller = reactor.add_poller("ios", Box::new(Nobody));
        let queue = layer.add_queue(reactor.waker(poller).ok_or("no waker")?);
        let channel = open.channel(reactor, &mut layer)?;
        let memory = Region::new(Mapping::anonymous(4096, Pages::Normal)?);
        let (mut batch, mut done): (Vec<IoId>, Vec<IoId>) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            for number in 0..depth {
                let id = layer.take().ok_or("the slab is empty")?;
                let io = layer.io_mut(id);
                (io.op, io.lba, io.blocks) = (Op::Read, number as u64, 1);
                io.list.push(Sge { region: memory.clone(), offset: 0, length: 4096 });
                io.push(queue, number as u64);
                batch.push(id);
            }
            layer.submit(reactor, channel, &batch);
            layer.unplug(reactor);
            batch.clear();
            layer.reap(reactor, queue, &mut done);
            for id in done.drain(..) {
                layer.finish(id);
            }
        }
        Ok(())
    })
}
