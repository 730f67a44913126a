//! In steady state a read or write allocates nothing.

use std::alloc::System;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::histogram::{GRANULARITY, Shape};
use qpair_bdev::malloc::Malloc;
use qpair_bdev::measures;
use qpair_bdev::null::Null;
use qpair_bdev::passthru::Passthru;
use qpair_bdev::trace::{self, ALL_POINTS};
use qpair_bdev::{ChannelId, Device, IoId, Layer, Op, OpSet, QueueId, Registry, Status};
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
    allocations_with(device, |_, _| {})
}

/// The same, on a bdev that was set up before.
fn allocations_with(device: Arc<dyn Device>, set_up: impl FnOnce(&Arc<Registry>, &str)) -> usize {
    let name = device.info().name;
    allocations_upon(device, &name, set_up)
}

/// The same, with I/O to the bdev `top`, which stands on it.
fn allocations_upon(device: Arc<dyn Device>, top: &str, set_up: impl FnOnce(&Arc<Registry>, &str)) -> usize {
    let name = device.info().name;
    let mut world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    registry.register(device).unwrap();
    set_up(&registry, &name);
    world.settle();
    let descriptor = registry.open(top, true, |_| {}).unwrap();
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

fn reads_and_writes_at_depth_128_allocate_nothing() {
    assert_eq!(allocations_of(Arc::new(Null::new("null", 512, 1024, None, 0))), 0, "null");
    assert_eq!(allocations_of(Arc::new(Malloc::new("malloc", 512, 1024, None, 0, 0).unwrap())), 0, "malloc");
}

fn a_tower_allocates_nothing() {
    let upon = |registry: &Arc<Registry>, _: &str| {
        for (name, base) in [("p0", "null"), ("p1", "p0"), ("top", "p1")] {
            registry.register(Arc::new(Passthru::new(registry, name, base, None).unwrap())).unwrap();
        }
    };
    assert_eq!(allocations_upon(Arc::new(Null::new("null", 512, 1024, None, 0)), "top", upon), 0);
}

fn limits_and_histograms_allocate_nothing() {
    let measured = |registry: &Arc<Registry>, name: &str| {
        let rates = [Some(1_000_000_000), Some(1 << 40), Some(1 << 40), Some(1 << 40)];
        measures::set_limits(registry, name, rates, Box::new(|outcome| outcome.unwrap()));
        let shape = Shape::new(GRANULARITY, 0, 1 << 40, OpSet::of(&[Op::Read, Op::Write])).unwrap();
        measures::enable_histogram(registry, name, Some(shape), Box::new(|outcome| outcome.unwrap()));
    };
    assert_eq!(allocations_with(Arc::new(Null::new("null", 512, 1024, None, 0)), measured), 0);
}

/// In a tower, so that what is passed on leaves records, too.
fn trace_points_allocate_nothing() {
    let traced = |on_and_off: &'static [u8]| {
        move |registry: &Arc<Registry>, _: &str| {
            registry.register(Arc::new(Passthru::new(registry, "top", "null", None).unwrap())).unwrap();
            on_and_off.iter().for_each(|points| trace::set(registry, *points, Box::new(|outcome| outcome.unwrap())));
        }
    };
    let null = || Arc::new(Null::new("null", 512, 1024, None, 0));
    assert_eq!(allocations_upon(null(), "top", traced(&[ALL_POINTS])), 0, "on");
    assert_eq!(allocations_upon(null(), "top", traced(&[ALL_POINTS, 0])), 0, "off again");
}

/// Keeps 8 I/Os under way on a bdev that takes 10,000 a second.
struct Waiting {
    queue: Option<QueueId>,
    channel: ChannelId,
    done: Rc<Cell<u64>>,
    reaped: Vec<IoId>,
}

impl Poller for Waiting {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let (Some(queue), layer) = (self.queue, Layer::of(reactor)) else { return 0 };
        let mut layer = layer.borrow_mut();
        layer.reap(reactor, queue, &mut self.reaped);
        let count = self.reaped.len();
        self.done.set(self.done.get() + count as u64);
        for id in &self.reaped {
            layer.retrieve(*id);
            layer.io_mut(*id).push(queue, 0);
        }
        layer.submit(reactor, self.channel, &self.reaped);
        self.reaped.clear();
        count
    }
}

fn waiting_for_a_limit_allocates_nothing() {
    let mut world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    registry.register(Arc::new(Null::new("null", 512, 1024, None, 0))).unwrap();
    measures::set_limits(&registry, "null", [Some(10_000), None, None, None], Box::new(|outcome| outcome.unwrap()));
    world.settle();
    let descriptor = registry.open("null", true, |_| {}).unwrap();
    let done = Rc::new(Cell::new(0));
    let told = done.clone();
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let poller = reactor.reserve_poller("test");
        let queue = layer.add_queue(reactor.waker(poller).unwrap());
        let channel = descriptor.channel(reactor, &mut layer).unwrap();
        let memory = Region::new(Mapping::anonymous(512, Pages::Normal).unwrap());
        let ids: Vec<IoId> = (0..8).map(|_| layer.take().unwrap()).collect();
        for id in &ids {
            let io = layer.io_mut(*id);
            (io.op, io.lba, io.blocks) = (Op::Read, 0, 1);
            io.list.push(Sge { region: memory.clone(), offset: 0, length: 512 });
            io.push(queue, 0);
        }
        layer.submit(reactor, channel, &ids);
        reactor.install_poller(poller, Box::new(Waiting { queue: Some(queue), channel, done: told, reaped: Vec::with_capacity(8) }));
    });
    world.run_until("the first thousand", 5_000_000, |_| done.get() >= 1000);
    let before = allocations();
    world.run_until("another thousand", 5_000_000, |_| done.get() >= 2000);
    assert_eq!(allocations() - before, 0);
}

/// One test, for the counter is the whole process's: another that begins or ends meanwhile allocates too.
#[test]
fn nothing_is_allocated_in_steady_state() {
    reads_and_writes_at_depth_128_allocate_nothing();
    limits_and_histograms_allocate_nothing();
    trace_points_allocate_nothing();
    waiting_for_a_limit_allocates_nothing();
    a_tower_allocates_nothing();
}
