//! In steady state a read or write allocates nothing.

use std::alloc::System;
use std::sync::Arc;

use qpair_bdev::malloc::Malloc;
use qpair_bdev::null::Null;
use qpair_bdev::{Device, IoId, Layer, Op, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::World;
use qpair_reactor::{Poller, Reactor};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn allocations() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

struct Nobody;

impl Poller for Nobody {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

/// Rounds of 128 I/Os of 4 KiB; returns the allocations of all rounds but the first ten.
fn allocations_of(device: Arc<dyn Device>) -> usize {
    let name = device.info().name;
    let mut world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    registry.register(device).unwrap();
    let descriptor = registry.open(&name, true, |_| {}).unwrap();
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let poller = reactor.add_poller("test", Box::new(Nobody));
        let queue = layer.add_queue(reactor.waker(poller).unwrap());
        let channel = descriptor.channel(reactor, &mut layer).unwrap();
        let memory = Region::new(Mapping::anonymous(128 << 12, Pages::Normal).unwrap());
        let mut batch: Vec<IoId> = Vec::with_capacity(128);
        let mut done: Vec<IoId> = Vec::with_capacity(128);
        let mut before = 0;
        for round in 0..110u64 {
            if round == 10 {
                before = allocations();
            }
            for number in 0..128u64 {
                let id = layer.take().unwrap();
                let io = layer.io_mut(id);
                io.op = if (round + number) % 2 == 0 { Op::Read } else { Op::Write };
                (io.lba, io.blocks) = (number * 8, 8);
                io.list.push(Sge { region: memory.clone(), offset: number << 12, length: 4096 });
                io.push(queue, number);
                batch.push(id);
            }
            layer.submit(reactor, channel, &batch);
            layer.unplug(reactor);
            batch.clear();
            layer.reap(reactor, queue, &mut done);
            assert_eq!(done.len(), 128);
            for id in done.drain(..) {
                layer.retrieve(id);
                assert_eq!(layer.io(id).status, Status::SUCCESS);
                layer.give_back(id);
            }
        }
        allocations() - before
    })
}

#[test]
fn reads_and_writes_at_depth_128_allocate_nothing() {
    assert_eq!(allocations_of(Arc::new(Null::new("null", 512, 1024, None, 0))), 0, "null");
    assert_eq!(allocations_of(Arc::new(Malloc::new("malloc", 512, 1024, None, 0, 0).unwrap())), 0, "malloc");
}
